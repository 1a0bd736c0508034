"""Two sides of a migration over real sockets, with a model guest: the handover, and every way back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from amig.errors import InDoubt, LinkLost, MigrationError, Refused, SnapshotError, UsageError
from amig.events import Event, Notice, Progress, RoundEnded, State, StateChanged
from amig.guest import RunState
from amig.memory import MemoryMap
from amig.policy import Policy
from amig.session.inbound import Phase
from amig.session.migration import Migration
from amig.session.restore import restore
from amig.transport import listen
from tests.modelguest import ModelGuest, ModelIncoming
from tests.receiving import PAGES, assert_moved, assert_stayed, busy_guest, receiving

SLOW = Policy(bandwidth=2e6, chunk=1 << 18)
"""Takes seconds: time enough to interfere."""


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("where", ["tcp", "unix"])
async def test_a_guest_moves_and_its_source_lets_go(where: str, streams: int, tmp_path: Path) -> None:
    guest = busy_guest()
    address = "tcp://127.0.0.1:0" if where == "tcp" else f"unix:{tmp_path}/s"
    async with receiving(address) as receiver:
        async with Migration(guest, receiver.address, Policy(streams=streams, compression="zstd")) as migration:
            events = [event async for event in migration]
        result = await migration.result()
    assert_moved(guest, receiver)
    assert result.status == "completed"
    assert result.exit_code == 0
    assert result.downtime_ms is not None
    assert result.pages.sent == PAGES // 2
    assert result.pages.total == PAGES
    assert result.window_ms.max > 0
    assert [e.state for e in events if isinstance(e, StateChanged)] == [
        State.CONNECTING,
        State.CONNECTING,
        State.MEMORY,
        State.SWITCHOVER,
        State.COMMITTING,
        State.COMPLETED,
    ]


@pytest.mark.parametrize(("processors", "connections"), [(1, 1), (3, 3)])
async def test_connections_nobody_asked_for_follow_the_processors(
    processors: int, connections: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amig.policy.MOST_CHOSEN", 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)))
    async with receiving() as receiver:
        async with Migration(busy_guest(), receiver.address, Policy(downtime=0.05)) as migration:
            pass
        assert (await migration.result()).streams == connections
        assert receiver.inbound is not None
        assert receiver.inbound.hello is not None
        assert receiver.inbound.hello.streams == connections
    file = f"file:{tmp_path}/one"
    async with Migration(busy_guest(), file, Policy(downtime=0.05)) as migration:
        pass
    assert (await migration.result()).streams == 1


async def test_the_handover_follows_its_order_on_both_sides() -> None:
    guest = busy_guest()
    async with receiving() as receiver, Migration(guest, receiver.address):
        pass
    assert guest.calls == ["log_start", "prepare", "pause", "save", "commit", "release running", "close", "log_stop"]
    assert receiver.phases == [Phase.MEMORY, Phase.LOADING, Phase.PREPARED, Phase.RUNNING]


async def test_progress_never_runs_backwards() -> None:
    guest = busy_guest()
    async with receiving() as receiver, Migration(guest, receiver.address, Policy(bandwidth=20e6)) as migration:
        fractions = [e.fraction async for e in migration if isinstance(e, Progress)]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


@pytest.mark.parametrize("state", [State.CONNECTING, State.MEMORY, State.SWITCHOVER])
async def test_cancel_in_each_state_leaves_the_guest_running(state: State) -> None:
    guest = busy_guest()
    migration: Migration

    def on_event(event: Event) -> None:
        if isinstance(event, StateChanged) and event.state is state:
            asyncio.get_running_loop().call_soon(migration.cancel)

    async with receiving() as receiver:
        async with Migration(guest, receiver.address, SLOW, on_event=on_event) as migration:
            if state is State.SWITCHOVER:
                migration.set_bandwidth(None)
        if state is State.CONNECTING:
            assert receiver.task is not None
            receiver.task.cancel()
            await asyncio.gather(receiver.task, return_exceptions=True)
            receiver.task = asyncio.create_task(asyncio.sleep(0))
    assert_stayed(guest)
    assert (await migration.result()).status == "cancelled"
    assert "run" not in receiver.guest.calls


async def test_cancel_after_commit_is_refused_and_the_guest_moves() -> None:
    guest = busy_guest()
    answers: list[bool] = []
    migration: Migration

    def on_event(event: Event) -> None:
        if isinstance(event, StateChanged) and event.state is State.COMMITTING:
            answers.append(migration.cancel())

    async with receiving() as receiver, Migration(guest, receiver.address, on_event=on_event) as migration:
        pass
    assert answers == [False]
    assert_moved(guest, receiver)


async def test_an_error_in_the_block_cancels_the_migration() -> None:
    guest = busy_guest()
    async with receiving() as receiver:
        with pytest.raises(ZeroDivisionError):
            async with Migration(guest, receiver.address, SLOW) as migration:
                async for event in migration:
                    if isinstance(event, Progress):
                        raise ZeroDivisionError
    assert_stayed(guest)


async def test_cancelling_the_task_that_waits_cancels_the_migration() -> None:
    guest = busy_guest()
    began = asyncio.Event()

    async def work(address: str) -> None:
        async with Migration(guest, address, SLOW) as migration:
            async for event in migration:
                if isinstance(event, Progress):
                    began.set()

    async with receiving() as receiver:
        task = asyncio.create_task(work(receiver.address))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert_stayed(guest)


async def test_nobody_listens() -> None:
    guest = busy_guest()
    listener = await listen("tcp://127.0.0.1:0")
    await listener.close()
    with pytest.raises(LinkLost, match="receive"):
        async with Migration(guest, listener.address):
            pass
    assert_stayed(guest)


async def test_the_destination_dies_while_memory_is_sent() -> None:
    guest = busy_guest()
    async with receiving() as receiver:
        with pytest.raises(LinkLost):
            async with Migration(guest, receiver.address, SLOW) as migration:
                async for event in migration:
                    if isinstance(event, Progress):
                        assert receiver.inbound is not None
                        for link in receiver.inbound._links:
                            link.abort()
    assert_stayed(guest)
    assert receiver.guest.calls == ["build", "discard"]


class Refusing(ModelIncoming):
    async def build(self, *, name: str, machine: bytes, memory: MemoryMap) -> str:
        raise Refused("this host lacks AVX-512")


async def test_a_refusal_says_why() -> None:
    guest = busy_guest()
    async with receiving(guest=Refusing()) as receiver:
        with pytest.raises(Refused, match="AVX-512"):
            async with Migration(guest, receiver.address):
                pass
    assert_stayed(guest)


class FailsAt(ModelIncoming):
    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step

    async def load(self, state: bytes) -> None:
        await super().load(state)
        if self.step == "load":
            raise MigrationError("the state does not fit")

    async def commit(self, migration: str) -> None:
        if self.step == "commit":
            raise MigrationError("the disk is full")
        await super().commit(migration)


@pytest.mark.parametrize("step", ["load", "commit"])
async def test_the_guest_comes_back_when_the_destination_fails(step: str) -> None:
    guest = busy_guest()
    async with receiving(guest=FailsAt(step)) as receiver:
        with pytest.raises(Exception, match=r"fit|discarded"):
            async with Migration(guest, receiver.address):
                pass
    assert guest.state is RunState.RUNNING
    assert guest.hub.strategy is None
    assert "run" not in receiver.guest.calls
    assert receiver.guest.calls[-1] == "discard"


async def test_a_lost_answer_to_commit_is_said_aloud_and_nobody_runs_the_source() -> None:
    guest = busy_guest()
    async with receiving() as receiver:

        def cut(phase: Phase) -> None:
            if phase is Phase.RUNNING:
                assert receiver.inbound is not None
                receiver.inbound._link.abort()

        receiver.on_phase = cut
        with pytest.raises(InDoubt, match="must not run here"):
            async with Migration(guest, receiver.address, Policy(connect_timeout=1, handover_timeout=0.3)):
                pass
    assert guest.state is RunState.COMMITTED
    assert receiver.guest.calls[-1] == "settle"


async def test_limits_can_be_changed_in_flight() -> None:
    guest = busy_guest()
    async with receiving() as receiver:
        async with asyncio.timeout(10), Migration(guest, receiver.address, Policy(bandwidth=1e5)) as migration:
            async for event in migration:
                if isinstance(event, StateChanged) and event.state is State.MEMORY:
                    migration.set_bandwidth(None)
                    migration.set_downtime(1.0)
    assert_moved(guest, receiver)


@pytest.mark.parametrize(("downtime", "told"), [(0.004, True), (3.0, False)])
async def test_a_limit_that_the_handover_itself_exceeds_is_told_beforehand(downtime: float, told: bool) -> None:
    guest = busy_guest()
    async with receiving() as receiver, Migration(guest, receiver.address, Policy(downtime=downtime)) as migration:
        events = [event async for event in migration]
    assert_moved(guest, receiver)
    notices = [at for at, event in enumerate(events) if isinstance(event, Notice) and "--downtime 4 ms" in event.text]
    assert len(notices) == told
    assert all(at < next(i for i, event in enumerate(events) if isinstance(event, RoundEnded)) for at in notices)


async def test_two_migrations_in_one_process() -> None:
    guests = [busy_guest(), busy_guest()]

    async def move(guest: ModelGuest) -> None:
        async with receiving() as receiver, Migration(guest, receiver.address, Policy(streams=2)):
            pass
        assert_moved(guest, receiver)

    async with asyncio.TaskGroup() as group:
        for guest in guests:
            group.create_task(move(guest))


async def test_a_guest_that_never_stops_writing_stays_when_time_is_up() -> None:
    guest = busy_guest()
    guest.before_take = lambda: guest.write(np.arange(PAGES))
    async with receiving() as receiver:
        with pytest.raises(MigrationError, match="--on-timeout switch"):
            async with Migration(guest, receiver.address, Policy(timeout=0.3, downtime=1e-5)) as migration:
                rounds = [e async for e in migration if isinstance(e, RoundEnded)]
    assert rounds
    assert_stayed(guest)


# --- snapshots -------------------------------------------------------------------------------------------------------


async def test_a_snapshot_leaves_the_guest_running_and_can_be_restored(tmp_path: Path) -> None:
    guest = busy_guest()
    path = tmp_path / "web1.amig"
    async with Migration(guest, f"file:{path}", Policy(compression="zstd")) as migration:
        pass
    assert_stayed(guest)
    assert guest.calls[:5] == ["log_start", "pause", "save", "resume", "log_stop"]
    assert (await migration.result()).downtime_ms is not None
    assert path.stat().st_mode & 0o777 == 0o600
    copy = ModelIncoming()
    hello = await restore(str(path), copy)
    assert hello.name == "model"
    assert copy.calls == ["build", "load"]
    assert copy.array is not None
    np.testing.assert_array_equal(copy.array.arrays[0], guest.array.arrays[0])


async def test_with_stop_a_snapshot_is_a_handover(tmp_path: Path) -> None:
    guest = busy_guest()
    path = tmp_path / "web1.amig"
    async with Migration(guest, f"file:{path}", stop=True):
        pass
    assert guest.state is RunState.STOPPED
    assert path.exists()


async def test_stop_makes_no_sense_for_a_peer() -> None:
    with pytest.raises(UsageError):
        async with Migration(busy_guest(), "tcp://127.0.0.1:1", stop=True):
            pass


async def test_a_cancelled_snapshot_leaves_no_file(tmp_path: Path) -> None:
    guest = busy_guest()
    async with Migration(guest, f"file:{tmp_path}/x", SLOW) as migration:
        async for event in migration:
            if isinstance(event, Progress):
                migration.cancel()
    assert_stayed(guest)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "flip"])
async def test_a_damaged_snapshot_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    async with Migration(busy_guest(), f"file:{path}"):
        pass
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-1000:]
    else:
        content[len(content) // 2] ^= 4
    path.write_bytes(content)
    copy = ModelIncoming()
    with pytest.raises(SnapshotError):
        await restore(str(path), copy)
    assert copy.calls[-1] == "discard"


async def test_a_snapshot_moves_into_a_waiting_host(tmp_path: Path) -> None:
    guest = busy_guest()
    path = tmp_path / "x"
    async with Migration(guest, f"file:{path}"):
        pass
    async with receiving() as receiver, Migration(f"file:{path}", receiver.address):
        pass
    assert receiver.error is None
    assert receiver.guest.array is not None
    np.testing.assert_array_equal(receiver.guest.array.arrays[0], guest.array.arrays[0])
    assert path.exists()


async def test_a_guest_is_shown_its_migration_and_may_have_it_cancelled() -> None:
    guest = busy_guest()
    async with receiving() as receiver:
        async with Migration(guest, receiver.address, SLOW) as migration:
            async for event in migration:
                if isinstance(event, Progress) and guest.progress.bytes_sent:
                    assert guest.registered == migration.id
                    assert guest.on_cancel is not None
                    guest.on_cancel(migration.id)
        assert migration.cancelled
    assert guest.registered == ""
    assert_stayed(guest)
