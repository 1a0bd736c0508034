"""What every `amig.guest.Guest` promises, held to by both implementations: in the process, and over the socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from inspect import iscoroutinefunction, signature
from pathlib import Path

import msgspec
import numpy as np
import pytest
import uvloop

from amig import bitmap
from amig.control.client import SocketGuest
from amig.errors import ControlError
from amig.guest import Guest, Handover, Outcome, RunState
from amig.host.hosted import HostedGuest, How
from amig.host.life import StateEnvelope
from amig.host.local import LocalGuest
from amig.host.memory import MappedMemory
from amig.host.record import RecordState

from .fakes import MAP, FakeMachine, hosted_guest, serving, until

ID = "0123456789abcdef" * 2
HANDOVER = Handover(migration=ID, destination="tcp://far:7000", peer="far/web1")


class World:
    """One hosted guest, and a way to open it as a `Guest`."""

    def __init__(self, hosted: HostedGuest, kind: str, path: Path) -> None:
        self.hosted = hosted
        self.machine: FakeMachine = hosted.machine  # type: ignore[assignment]
        self._kind = kind
        self._path = path
        self._opened: list[LocalGuest | SocketGuest] = []

    async def open(self, name: str = "migration") -> LocalGuest | SocketGuest:
        guest: LocalGuest | SocketGuest
        if self._kind == "local":
            guest = LocalGuest(self.hosted, name=name)
        else:
            guest = await SocketGuest.connect(self._path, map_memory=MappedMemory.from_fds, client=name)
        self._opened.append(guest)
        return guest

    async def close(self) -> None:
        for guest in self._opened:
            await guest.close()


@asynccontextmanager
async def a_world(kind: str, directory: Path) -> AsyncIterator[World]:
    path = directory / "s"
    async with hosted_guest(directory) as hosted, serving(hosted, path):
        world = World(hosted, kind, path)
        yield world
        await world.close()


@pytest.fixture(params=["local", "socket"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(request.param, tmp_path) as world:
        yield world


def pages(words: np.ndarray) -> list[int]:
    return [int(i) for i in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]


def everything(guest: Guest) -> dict[int, list[int]]:
    return {region.id: list(range(region.pages)) for region in guest.info.memory.regions}


async def drain(guest: Guest) -> None:
    """Take all there is, as a first round does."""
    await guest.sync()
    for region in guest.info.memory.regions:
        await guest.take_and_clear(region.id, 0, region.pages)


async def test_it_says_what_the_guest_is(world: World) -> None:
    guest = await world.open()
    assert guest.info.name == "web1"
    assert guest.info.engine == "fake"
    assert guest.info.vcpus == 2
    assert guest.info.memory == MAP
    assert guest.info.state is RunState.RUNNING
    assert guest.info.strategies[0] == "exact"
    assert b"fake machine" in guest.info.machine


async def test_it_shows_live_memory(world: World) -> None:
    guest = await world.open()
    world.machine.write(7, 63, 0xAB)
    assert guest.memory.pages(7)[63].tolist() == [0xAB] * 4096
    assert (63, 1) in guest.memory.data_ranges(7, 0, 64)


async def test_all_pages_are_pending_when_the_log_starts(world: World) -> None:
    guest = await world.open()
    started = await guest.log_start(None)
    assert started.strategy == "exact"
    assert started.initially_set
    assert started.generation == 1
    found = await guest.sync()
    assert {region: pages(words) for region, words in found.items()} == everything(guest)


async def test_a_taken_page_is_not_pending_until_it_is_written_again(world: World) -> None:
    guest = await world.open()
    await guest.log_start("slot-cache")
    await drain(guest)
    assert not any(words.any() for words in (await guest.sync()).values())
    world.machine.write(0, 199, 1)
    world.machine.write(7, 0, 1)
    found = await guest.sync()
    assert {region: pages(words) for region, words in found.items()} == {0: [199], 7: [0]}
    assert pages(await guest.take_and_clear(0, 192, 8)) == [7]
    assert world.machine.log.peek(0)[3] == 0
    assert pages(await guest.take_and_clear(0, 192, 8)) == []


async def test_takes_of_neighbouring_ranges_may_be_under_way_at_once(world: World) -> None:
    guest = await world.open()
    await guest.log_start(None)
    await guest.sync()
    ranges = [(0, 0, 64), (0, 64, 64), (0, 128, 72), (7, 0, 64)] * 8
    taken = await asyncio.gather(*(guest.take_and_clear(*r) for r in ranges))
    assert sum(bitmap.count(words) for words in taken) <= 264 * 8
    # the words of a range are good until it is taken again: the last takes found nothing
    assert [pages(words) for words in taken[-4:]] == [[], [], [], []]
    assert not any(words.any() for words in (await guest.sync()).values())


async def test_what_is_handed_out_cannot_be_written(world: World) -> None:
    guest = await world.open()
    await guest.log_start(None)
    found = await guest.sync()
    taken = await guest.take_and_clear(0, 0, 64)
    for words in (found[0], taken):
        with pytest.raises(ValueError, match="read-only"):
            words[0] = 0


@pytest.mark.parametrize(
    ("region", "first", "count"),
    [(0, 1, 64), (0, 0, 63), (0, 192, 64), (0, 0, 0), (3, 0, 64), (0, 256, 64), (0, -64, 64)],
)
async def test_a_range_that_is_none_is_refused(world: World, region: int, first: int, count: int) -> None:
    guest = await world.open()
    await guest.log_start(None)
    await guest.sync()
    with pytest.raises(ControlError) as caught:
        await guest.take_and_clear(region, first, count)
    assert caught.value.code == "bad-range"
    assert bitmap.count((await guest.sync())[0]) == 200


async def test_returned_bits_are_pending_again(world: World) -> None:
    guest = await world.open()
    await guest.log_start(None)
    await guest.sync()
    taken = await guest.take_and_clear(0, 64, 136)
    await guest.give_back(0, 64, taken)
    assert pages((await guest.sync())[0]) == list(range(200))
    assert pages(await guest.take_and_clear(0, 0, 200)) == list(range(200))


async def test_without_the_log_nothing_can_be_taken(world: World) -> None:
    guest = await world.open()
    calls: list[Callable[[], object]] = [
        guest.sync,
        lambda: guest.take_and_clear(0, 0, 64),
        lambda: guest.give_back(0, 0, np.ones(1, np.uint64)),
    ]
    for call in calls:
        with pytest.raises(ControlError) as caught:
            await call()  # type: ignore[misc]
        assert caught.value.code == "not-a-user"


async def test_starting_twice_is_refused_and_stopping_twice_is_not(world: World) -> None:
    guest = await world.open()
    await guest.log_start(None)
    with pytest.raises(ControlError) as caught:
        await guest.log_start(None)
    assert caught.value.code == "already-on"
    assert world.machine.logging
    await guest.log_stop()
    await guest.log_stop()
    assert not world.machine.logging
    await guest.log_start(None)
    assert world.machine.logging


async def test_users_have_bits_of_their_own(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    await one.log_start(None)
    await drain(one)
    await two.log_start(None)
    assert bitmap.count((await two.sync())[0]) == 200
    assert bitmap.count((await one.sync())[0]) == 0
    world.machine.write(0, 5, 1)
    assert pages((await one.sync())[0]) == [5]
    await one.take_and_clear(0, 0, 64)
    assert 5 in pages((await two.sync())[0])
    await one.log_stop()
    assert world.machine.logging
    await two.log_stop()
    assert not world.machine.logging


async def test_a_strategy_in_use_or_unknown_is_refused(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    await one.log_start("slot-cache")
    with pytest.raises(ControlError) as caught:
        await two.log_start("auto-clear")
    assert caught.value.code == "strategy-in-use"
    with pytest.raises(ControlError) as caught:
        await two.log_start("no-such")
    assert caught.value.code in ("unsupported", "strategy-in-use")


async def test_pause_and_resume(world: World) -> None:
    guest = await world.open()
    await guest.pause()
    assert not world.machine.running
    assert world.hosted.state is RunState.PAUSED
    await guest.pause()
    await guest.resume()
    assert world.machine.running
    await guest.resume()


async def test_an_operators_pause_stays(world: World) -> None:
    guest = await world.open()
    await world.hosted.operator_pause()
    await guest.pause()
    await guest.resume()
    assert not world.machine.running
    await guest.pause()
    await world.hosted.operator_resume()
    assert not world.machine.running
    await guest.resume()
    assert world.machine.running


async def test_state_is_saved_while_paused_and_only_then(world: World) -> None:
    guest = await world.open()
    with pytest.raises(ControlError) as caught:
        await guest.save()
    assert caught.value.code == "wrong-state"
    await guest.pause()
    world.machine.state = bytes(range(256)) * 8192
    saved = msgspec.msgpack.decode(await guest.save(), type=StateEnvelope)
    assert saved.machine == world.machine.state
    assert not saved.paused


async def test_two_migrations_at_once_are_refused(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    await one.migration_begin(ID, "tcp://far:7000")
    for call in (two.pause, lambda: two.prepare(HANDOVER), lambda: two.migration_begin(ID, "x")):
        with pytest.raises(ControlError) as caught:
            await call()  # type: ignore[no-untyped-call]
        assert caught.value.code == "busy"
        assert "one" in str(caught.value)
    await one.migration_end("cancelled")
    await two.pause()
    with pytest.raises(ControlError) as caught:
        await one.pause()
    assert caught.value.code == "busy"


async def hand_over(guest: Guest) -> None:
    await guest.log_start(None)
    await guest.pause()
    await drain(guest)
    await guest.save()
    await guest.prepare(HANDOVER)
    await guest.commit(ID)


async def test_a_committed_guest_does_not_run_here(world: World) -> None:
    guest = await world.open()
    await hand_over(guest)
    assert world.hosted.state is RunState.COMMITTED
    record = world.hosted.records.source("web1")
    assert record is not None
    assert record.state is RecordState.COMMITTED
    assert (record.migration, record.destination, record.peer) == (ID, "tcp://far:7000", "far/web1")
    with pytest.raises(ControlError) as caught:
        await guest.resume()
    assert caught.value.code == "wrong-state"
    await guest.close()
    assert world.hosted.state is RunState.COMMITTED
    assert not world.machine.running
    assert not world.machine.logging
    assert world.hosted.in_doubt == HANDOVER


async def test_released_as_running_the_guest_has_moved(world: World) -> None:
    guest = await world.open()
    await hand_over(guest)
    await guest.release(ID, Outcome.RUNNING)
    assert world.hosted.state is RunState.STOPPED
    ended = await world.hosted.ended
    assert ended.how is How.MOVED
    assert ended.handover == HANDOVER
    record = world.hosted.records.source("web1")
    assert record is not None
    assert record.state is RecordState.RELEASED


async def test_released_as_discarded_the_guest_runs_on(world: World) -> None:
    guest = await world.open()
    await hand_over(guest)
    await guest.release(ID, Outcome.DISCARDED)
    assert world.hosted.state is RunState.RUNNING
    assert world.machine.running
    world.hosted.records.check_may_boot("web1")
    # and it can be handed over again
    await guest.log_stop()
    await hand_over(guest)


async def test_another_connection_may_release_but_only_that_migration(world: World) -> None:
    one, two = await world.open("one"), await world.open("two")
    await hand_over(one)
    await one.close()
    with pytest.raises(ControlError) as caught:
        await two.release("f" * 32, Outcome.DISCARDED)
    assert caught.value.code == "wrong-migration"
    assert not world.machine.running
    await two.release(ID, Outcome.DISCARDED)
    assert world.machine.running


async def test_commit_needs_a_pause_and_the_prepared_migration(world: World) -> None:
    guest = await world.open()
    await guest.prepare(HANDOVER)
    with pytest.raises(ControlError) as caught:
        await guest.commit(ID)
    assert caught.value.code == "wrong-state"
    await guest.pause()
    with pytest.raises(ControlError) as caught:
        await guest.commit("e" * 32)
    assert caught.value.code == "wrong-migration"
    assert world.hosted.state is RunState.PAUSED
    with pytest.raises(ControlError):
        await guest.release(ID, Outcome.RUNNING)


async def test_closing_undoes_everything_before_commit(world: World) -> None:
    guest = await world.open()
    await guest.migration_begin(ID, "tcp://far:7000")
    await guest.log_start(None)
    await guest.pause()
    await drain(guest)
    await guest.prepare(HANDOVER)
    await guest.close()
    await guest.close()
    assert world.machine.running
    assert not world.machine.logging
    assert world.hosted.migration is None
    assert world.hosted.records.source("web1") is None
    with pytest.raises(ControlError) as caught:
        await guest.pause()
    assert caught.value.code == "closed"


async def test_closing_leaves_an_operators_pause(world: World) -> None:
    guest = await world.open()
    await guest.pause()
    await world.hosted.operator_pause()
    await guest.close()
    assert world.hosted.state is RunState.PAUSED
    assert not world.machine.running


async def test_a_cancelled_take_gives_its_bits_back(world: World) -> None:
    guest = await world.open()
    await guest.log_start(None)
    await guest.sync()
    with world.machine.log.atomically():  # the kernel's lock: the take hangs in its clear
        take = asyncio.ensure_future(guest.take_and_clear(0, 0, 64))
        for _ in range(5):
            await asyncio.sleep(0.01)
        take.cancel()
        await asyncio.sleep(0)
        assert not take.done()
    with pytest.raises(asyncio.CancelledError):
        await take
    assert pages((await guest.sync())[0]) == list(range(200))


async def test_a_cancelled_pause_ends_before_it_is_reported(world: World) -> None:
    guest = await world.open()
    world.machine.before_pause.clear()
    pause = asyncio.ensure_future(guest.pause())
    await until(lambda: world.hosted.state is RunState.PAUSED)
    pause.cancel()
    await asyncio.sleep(0.01)
    assert not pause.done()
    world.machine.before_pause.set()
    with pytest.raises(asyncio.CancelledError):
        await pause
    assert not world.machine.running
    await guest.close()
    assert world.machine.running


async def test_an_operators_cancel_reaches_the_migrator(world: World) -> None:
    guest = await world.open()
    with pytest.raises(ControlError) as caught:
        world.hosted.cancel_migration()
    assert caught.value.code == "no-migration"
    await guest.migration_begin(ID, "tcp://far:7000")
    assert not guest.cancel_requested.is_set()
    assert world.hosted.cancel_migration() == ID
    async with asyncio.timeout(30):
        await guest.cancel_requested.wait()
    await guest.migration_end("cancelled")
    assert world.hosted.migration is None
    assert world.hosted.last_migration is not None
    assert world.hosted.last_migration.status == "cancelled"


async def test_after_commit_it_is_too_late_to_cancel(world: World) -> None:
    guest = await world.open()
    await guest.migration_begin(ID, "tcp://far:7000")
    await hand_over(guest)
    with pytest.raises(ControlError) as caught:
        world.hosted.cancel_migration()
    assert caught.value.code == "too-late"


async def test_a_guest_that_powers_off_refuses_to_be_migrated(world: World) -> None:
    guest = await world.open()
    await guest.log_start(None)
    world.machine.power_off()
    await until(lambda: world.hosted.state is RunState.STOPPED)
    with pytest.raises(ControlError) as caught:
        await guest.pause()
    assert caught.value.code == "wrong-state"
    assert (await world.hosted.ended).how is How.POWERED_OFF


async def test_a_crash_is_told_with_its_reason(world: World) -> None:
    guest = await world.open()
    world.machine.crash()
    await until(lambda: world.hosted.state is RunState.FAILED)
    with pytest.raises(ControlError, match="failed"):
        await guest.prepare(HANDOVER)
    ended = await world.hosted.ended
    assert ended.how is How.FAILED
    assert "triple fault" in str(ended.error)


PROMISES = [
    name
    for name, test in list(globals().items())
    if name.startswith("test_") and list(signature(test).parameters) == ["world"]
]


@pytest.mark.parametrize("kind", ["local", "socket"])
@pytest.mark.parametrize("promise", PROMISES)
def test_all_of_it_under_uvloop(promise: str, kind: str, tmp_path: Path) -> None:
    test = globals()[promise]
    assert iscoroutinefunction(test)

    async def run() -> None:
        async with a_world(kind, tmp_path) as world:
            await test(world)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
