"""Which design of the dirty log a migration takes: the best, what is in use, or what it was told."""

from __future__ import annotations

import pytest

from amig.dirty.hub import DirtyLogHub
from amig.dirty.log import LogAbilities
from amig.errors import ControlError
from amig.policy import Policy
from amig.session.migration import Migration
from amig.sim.kernel_log import SimKernelLog
from tests.modelguest import ModelGuest
from tests.receiving import assert_moved, assert_stayed, busy_guest, receiving

OLD = LogAbilities(manual_clear=False, initially_set=False)


async def moved_with(guest: ModelGuest, policy: Policy | None = None) -> str:
    async with receiving() as receiver:
        async with Migration(guest, receiver.address, policy or Policy()) as migration:
            result = await migration.result()
    assert result.status == "completed", result.error
    assert_moved(guest, receiver)
    return result.dirty_log


async def test_the_default_is_exact() -> None:
    guest = busy_guest()
    assert await moved_with(guest) == "exact"


async def test_a_kernel_without_manual_clear_gets_auto_clear() -> None:
    guest = busy_guest()
    guest.log = SimKernelLog(guest.array.map, OLD)
    guest.hub = DirtyLogHub(guest.log, guest.array.map)
    assert await moved_with(guest) == "auto-clear"


@pytest.mark.parametrize("asked", [None, "exact", "slot-cache"])
async def test_a_meter_that_was_there_first_is_no_obstacle(asked: str | None) -> None:
    guest = busy_guest()
    guest.hub.open("meter")
    assert await moved_with(guest, Policy(dirty_log=asked)) == (asked or "exact")


async def test_a_migration_that_was_not_told_takes_what_is_in_use() -> None:
    guest = busy_guest()
    guest.hub.open("meter", "auto-clear")
    assert await moved_with(guest) == "auto-clear"


async def refused(guest: ModelGuest, policy: Policy) -> ControlError:
    with pytest.raises(ControlError) as caught:
        async with Migration(guest, "tcp://127.0.0.1:9", policy):
            pass
    return caught.value


@pytest.mark.parametrize(
    ("policy", "code"),
    [(Policy(), "busy"), (Policy(dirty_log="exact"), "busy"), (Policy(dirty_log="slot-cache"), "strategy-in-use")],
)
async def test_a_second_migration_is_refused(policy: Policy, code: str) -> None:
    guest = busy_guest()
    first = guest.hub.open("first migration", "exact")
    assert (await refused(guest, policy)).code == code
    first.close()
    assert_stayed(guest)


@pytest.mark.parametrize("name", ["blind", "migration-bitmap"])
async def test_what_loses_pages_has_to_be_allowed(name: str) -> None:
    guest = busy_guest()
    assert (await refused(guest, Policy(dirty_log=name))).code == "unsafe"
    assert_stayed(guest)
    assert await moved_with(guest, Policy(dirty_log=name, may_lose_pages=True)) == name


async def test_nobody_joins_by_accident_what_loses_pages() -> None:
    guest = busy_guest()
    user = guest.hub.open("experiment", "migration-bitmap", unsafe=True)
    assert (await refused(guest, Policy())).code == "unsafe"
    user.close()
    assert_stayed(guest)
