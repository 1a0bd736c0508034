"""Whole migrations of a guest that checks itself: on real KVM, and the same on the simulator where there is none."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

import amig
from amig.errors import LinkLost, MigrationError
from amig.events import State, StateChanged
from amig.host import guest_abi as abi
from amig.host.attach import open_control
from amig.session.inbound import Phase
from amig.stages.clear_log import ClearLog
from amig.stages.dirty_sync import DirtySync
from amig.stages.items import Block, Chunk, Extent
from amig.stages.place import Place
from tests.moving import (
    CHECK,
    MIB,
    Output,
    alive,
    assert_stayed,
    homes,  # noqa: F401 - a fixture
    hosting,
    machine_of,
    move,
    receiving,
    verdict,
)

pytestmark = pytest.mark.usefixtures("homes")
ENGINES = [pytest.param("kvm", marks=pytest.mark.kvm), "simulator"]
STANDARD = pytest.mark.standard
BUSY = amig.Policy(downtime=0.05, timeout=30, on_timeout="switch")
UNVERIFIED = replace(BUSY, verify="off")
"""For tests of the guest's own verdict: digests would find some of the damage before."""
STREAMS = amig.Policy(streams=4, compression="zstd", workers=2, downtime=0.1, timeout=30, on_timeout="switch")
both_ways = pytest.mark.parametrize("policy", [BUSY, STREAMS], ids=["plain", "streams-zstd"])
"""What must hold for one raw connection must hold for four compressed ones."""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("vcpus", [pytest.param(1, marks=STANDARD), pytest.param(2, marks=STANDARD), 4])
async def test_a_checking_guest_moves_intact(engine: str, vcpus: int) -> None:
    async with hosting(engine=engine, vcpus=vcpus) as source, receiving() as target:
        result = await move(source, target.address, BUSY)
        await target.arrived()
        assert result.status == "completed"
        assert result.engine == engine
        assert (await source.ended()).how is amig.How.MOVED
        await alive(machine_of(target.service))
        assert await verdict(machine_of(target.service)) == 0


@both_ways
@pytest.mark.parametrize("engine", ENGINES)
async def test_back_and_forth(engine: str, policy: amig.Policy) -> None:
    async with hosting(engine=engine, vcpus=2) as source, receiving() as second, receiving() as third:
        await move(source, second.address, policy)
        await second.arrived()
        await move(second.service, third.address, policy)
        await third.arrived()
        assert await verdict(machine_of(third.service)) == 0


@STANDARD
@pytest.mark.parametrize("engine", ENGINES)
async def test_four_streams_and_compression(engine: str) -> None:
    async with hosting(engine=engine) as source, receiving() as target:
        result = await move(source, target.address, STREAMS)
        await target.arrived()
        assert result.streams == 4
        assert await verdict(machine_of(target.service)) == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cache", [1 << 30, 2 * MIB], ids=["all-memory", "too-small"])
async def test_differences_instead_of_pages(engine: str, cache: int) -> None:
    # A few rounds whatever the pace: nothing fits such a downtime.
    policy = amig.Policy(delta_cache=cache, bandwidth=100e6, downtime=1e-6, max_rounds=4, on_timeout="switch")
    async with hosting(engine=engine) as source, receiving() as target:
        result = await move(source, target.address, policy)
        await target.arrived()
        assert result.pages.delta > 0
        assert await verdict(machine_of(target.service)) == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", ["slot-cache", "auto-clear", "exact"])
async def test_every_safe_strategy_of_the_dirty_log(engine: str, strategy: str) -> None:
    policy = amig.Policy(dirty_log=strategy, downtime=0.05, timeout=30, on_timeout="switch")
    async with hosting(engine=engine) as source, receiving() as target:
        result = await move(source, target.address, policy)
        await target.arrived()
        assert result.dirty_log == strategy
        assert await verdict(machine_of(target.service)) == 0


@both_ways
@pytest.mark.kvm
@pytest.mark.parametrize(
    "append",
    [
        "workload=idle",
        "workload=fill fill=mixed fill_size=16M",
        "workload=sequential ws=16M rate=50M",
        "workload=random ws=16M rate=50M write=page",
        "workload=hotspot ws=16M rate=50M hot=90:10",
        "workload=check ws=16M rate=50M",
    ],
)
async def test_every_workload_moves(append: str, policy: amig.Policy) -> None:
    async with hosting(append) as source, receiving() as target:
        await move(source, target.address, policy)
        await target.arrived()
        await alive(machine_of(target.service))


@both_ways
@pytest.mark.kvm
async def test_a_guest_above_the_4_gib_hole_moves(policy: amig.Policy) -> None:
    append = "workload=check ws=32M ws_from=4G rate=50M"
    async with hosting(append, memory=3200 * MIB) as source, receiving() as target:
        result = await move(source, target.address, policy)
        await target.arrived()
        assert result.pages.total == 3200 * 256
        assert result.pages.zero > 3000 * 256, "holes are not sent"
        assert await verdict(machine_of(target.service)) == 0


@both_ways
@pytest.mark.parametrize("engine", ENGINES)
async def test_through_a_unix_socket(engine: str, policy: amig.Policy, tmp_path: Path) -> None:
    async with hosting(engine=engine) as source, receiving(f"unix:{tmp_path}/in") as target:
        await move(source, target.address, policy)
        await target.arrived()
        assert await verdict(machine_of(target.service)) == 0


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_live_snapshot_and_what_becomes_of_it(engine: str, tmp_path: Path) -> None:
    async with hosting(engine=engine) as source:
        result = await move(source, f"file:{tmp_path}/snap", BUSY)
        assert result.status == "completed"
        await assert_stayed(source)
    async with receiving() as target:
        async with amig.Migration(f"file:{tmp_path}/snap", target.address) as migration:
            pass
        assert (await migration.result()).status == "completed"
        await target.arrived()
        assert await verdict(machine_of(target.service)) == 0


@both_ways
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("state", [State.MEMORY, State.SWITCHOVER])
async def test_cancel_leaves_the_source_running_and_logging_off(engine: str, state: State, policy: amig.Policy) -> None:
    migration: amig.Migration

    def on_event(event: amig.Event) -> None:
        if isinstance(event, StateChanged) and event.state is state:
            asyncio.get_running_loop().call_soon(migration.cancel)

    async with hosting(engine=engine) as source, receiving() as target:
        async with amig.Migration(source.name, target.address, policy, on_event=on_event) as migration:
            pass
        assert (await migration.result()).status == "cancelled"
        await assert_stayed(source)


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_destination_that_dies_while_memory_is_sent_leaves_the_source_running(engine: str) -> None:
    async with hosting(engine=engine) as source:
        with pytest.raises((LinkLost, MigrationError)):
            async with receiving() as target:
                slow = amig.Policy(bandwidth=5e6)
                async with amig.Migration(source.name, target.address, slow) as migration:
                    async for event in migration:
                        if isinstance(event, amig.Progress) and event.bytes_sent:
                            assert target._serving is not None
                            target._serving.cancel()
        await assert_stayed(source)


@both_ways
@pytest.mark.parametrize("engine", ENGINES)
async def test_after_a_failed_attempt_the_next_one_succeeds(engine: str, policy: amig.Policy) -> None:
    async with hosting(engine=engine) as source, receiving() as target:
        async with amig.Migration(source.name, target.address, amig.Policy(bandwidth=5e6)) as migration:
            async for event in migration:
                if isinstance(event, amig.Progress) and event.bytes_sent:
                    migration.cancel()
        await assert_stayed(source)
        await move(source, target.address, policy)
        await target.arrived()
        assert await verdict(machine_of(target.service)) == 0


@both_ways
@pytest.mark.kvm
async def test_the_console_goes_on_at_the_destination(policy: amig.Policy) -> None:
    here, there = Output(), Output()
    async with hosting(CHECK.replace("report=0", "report=1"), output=here) as source, receiving(output=there) as target:
        await move(source, target.address, policy)
        await target.arrived()
        await asyncio.wait_for(_line(there), 20)
    assert "amig-guest" in here.text or "check" in here.text
    assert "mismatches=0" in there.text


async def _line(output: Output) -> None:
    while "mismatches=" not in output.text or not output.text.endswith("\n"):
        await asyncio.sleep(0.01)


# --- the check bites ------------------------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_the_guest_reports_a_page_that_was_dropped_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination that loses one page: the guest must say so, or its verdict is worth nothing."""
    lost: list[int] = []
    place = Place._place

    def drop_one(self: Place, block: Block) -> None:
        place(self, block)
        if block.first <= lost[0] < block.first + block.span:
            self._memory[block.region][lost[0]] = 0

    monkeypatch.setattr(Place, "_place", drop_one)
    async with hosting("workload=check ws=24M rate=1M report=0") as source, receiving() as target:
        status = abi.parse_status(machine_of(source).memory.pages(0).reshape(-1))
        lost.append(int(status["ws"][0]["gpa"]) // 4096 + 1000)
        await move(source, target.address, UNVERIFIED)
        await target.arrived()
        assert await verdict(machine_of(target.service)) > 0


@pytest.mark.kvm
async def test_the_guest_reports_clears_that_come_after_the_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that the project is about, broken: what is written between read and clear is lost."""
    owed: list[tuple[int, int, int]] = []

    async def read_first(self: ClearLog, extent: Extent) -> Chunk:
        dirty = await self._guest.sync()
        words = dirty[extent.region][extent.first // 64 : -(-(extent.first + extent.count) // 64)].copy()
        self._ledger.take(extent.round, extent.region, extent.first, words)
        owed.append((extent.region, extent.first, extent.count))
        return Chunk(extent=extent, words=words, cleared_ns=0)

    sync = DirtySync._sync

    async def clear_then_sync(self: DirtySync):  # type: ignore[no-untyped-def]
        await sync(self)
        for region, first, count in owed:
            await self._guest.take_and_clear(region, first, count)
        owed.clear()
        return await sync(self)

    monkeypatch.setattr(ClearLog, "_clear", read_first)
    monkeypatch.setattr(DirtySync, "_sync", clear_then_sync)
    async with hosting("workload=check ws=24M rate=400M report=0") as source, receiving() as target:
        await move(source, target.address, UNVERIFIED)
        await target.arrived()
        assert await verdict(machine_of(target.service)) > 0


def test_phases_are_named_for_people() -> None:
    assert [str(p) for p in Phase] == ["waiting", "memory", "lost", "loading", "prepared", "running", "discarded"]


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_guest_that_an_operator_has_paused_stays_paused_where_it_goes(engine: str) -> None:
    async with hosting(engine=engine) as source, receiving() as target:
        await source.hosted.operator_pause()
        await move(source, target.address)
        await target.arrived()
        assert target.service.hosted.state is amig.RunState.PAUSED
        assert target.service.hosted.operator_paused
        await target.service.hosted.operator_resume()
        await alive(machine_of(target.service))
        assert await verdict(machine_of(target.service)) == 0


@pytest.mark.parametrize("engine", ENGINES)
async def test_receive_hosts_a_guest_from_its_arrival_to_its_end(engine: str) -> None:
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with hosting(engine=engine) as source:
        here = asyncio.create_task(amig.receive("tcp://127.0.0.1:0", name="arrival", listening=address.set_result))
        await move(source, await address, BUSY)
        async with await open_control("arrival") as control:
            await control.stop()
        assert (await here).how is amig.How.STOPPED
