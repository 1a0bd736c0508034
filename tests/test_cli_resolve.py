"""`amig resolve`: handovers in doubt, with their host alive and with their host gone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from amig import errors
from amig.guest import Handover
from amig.host.attach import open_guest
from amig.host.handover import Records
from amig.host.record import RecordState
from tests.commands import SIMULATED, Process, amig, homes, ok, running, wait

__all__ = ["homes"]

pytestmark = pytest.mark.usefixtures("homes")
ID = "0123456789abcdef" * 2


async def _commit(name: str) -> None:
    """A migrator that dies right after COMMIT."""
    guest = await open_guest(name)
    await guest.prepare(Handover(migration=ID, destination="tcp://far:7000", peer="far/web1"))
    await guest.pause()
    await guest.commit(ID)
    await guest.close()


@contextmanager
def in_doubt() -> Iterator[Process]:
    with running("a") as host:
        asyncio.run(_commit("a"))
        yield host


def guest_memories() -> int:
    """How many descriptors of guests' memory this process has; not all have to be ours."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the folder's own
            found += "memfd:amig-guest" in str(link.readlink())
    return found


def test_status_and_list_tell_of_it() -> None:
    with in_doubt() as host:
        for text in (ok("status", "a").out, ok("list").out):
            assert "IN DOUBT" in text
            assert "tcp://far:7000" in text
        assert amig("stop", "a").code == errors.ControlError.exit_code
        ok("stop", "a", "--force")
        assert host.end().code == 0


def test_run_here_lets_it_run_on() -> None:
    with in_doubt():
        assert "runs on here" in ok("resolve", "a", "--run-here").out
        assert ok("status", "a", "--json").lines[0]["state"] == "running"
        assert ok("verify", "a").code == 0
        again = amig("resolve", "a", "--discard")
        assert again.code == errors.HostError.exit_code
        assert "no handover of a is in doubt" in again.err


def test_discard_lets_go_of_it() -> None:
    with in_doubt() as host:
        assert "a runs at tcp://far:7000" in ok("resolve", "a", "--discard").out
        ended = host.end()
        assert ended.code == 0
        assert ended.lines[-1]["destination"] == "tcp://far:7000"


@pytest.mark.parametrize(
    ("option", "state"), [("--run-here", RecordState.RETURNED), ("--discard", RecordState.RELEASED)]
)
def test_with_its_host_gone_the_record_is_settled_and_nothing_starts_before(option: str, state: RecordState) -> None:
    with in_doubt() as host:
        host.popen.kill()
        host.end()
    refused = amig("run", "a", *SIMULATED)
    assert refused.code == errors.HostError.exit_code
    for part in ("tcp://far:7000", "amig resolve a --discard", "amig resolve a --run-here"):
        assert part in refused.err
    assert "IN DOUBT" in ok("list").out
    assert ok("list", "--json").lines == [{"name": "a", "state": "gone", "in_doubt": {"destination": "tcp://far:7000"}}]
    ok("resolve", "a", option)
    record = Records().source("a")
    assert record is not None
    assert record.state is state
    if option == "--discard":  # it runs elsewhere: booted here, there would be two of it
        assert amig("resolve", "a", option).code == errors.HostError.exit_code
        before = guest_memories()
        second = amig("run", "a", *SIMULATED)
        assert second.code == errors.HostError.exit_code
        assert "moved to tcp://far:7000" in second.err
        assert guest_memories() <= before, "memory of a guest that was not started"
        ok("resolve", "a", "--run-here")
    assert amig("resolve", "a", "--run-here").code == errors.HostError.exit_code
    with running("a"):
        assert ok("status", "a").code == 0


def test_a_host_that_is_told_to_end_in_doubt_says_so() -> None:
    with in_doubt() as host:
        host.popen.terminate()
        said = host.end()
        assert said.code == errors.InDoubt.exit_code
        assert "amig resolve a --run-here" in said.err
    assert amig("run", "a", *SIMULATED).code == errors.HostError.exit_code


def test_nothing_to_resolve() -> None:
    assert amig("resolve", "nobody", "--discard").code == errors.HostError.exit_code
    assert amig("resolve", "/no/such.sock", "--discard").code == errors.NoSuchGuest.exit_code
    with running("a"):
        wait(lambda: ok("status", "a").code == 0, "it runs")
        assert "no handover of a is in doubt" in amig("resolve", "a", "--run-here").err
