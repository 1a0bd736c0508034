"""A migration that loses its connection goes on over another: nothing is lost, little is sent twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from amig.errors import LinkLost
from amig.events import Event, Progress, State, StateChanged
from amig.guest import RunState
from amig.memory import PAGE_SIZE
from amig.policy import Policy
from amig.session.inbound import Inbound, Phase
from amig.session.migration import Migration
from amig.transport import listen
from tests.modelguest import ModelGuest, ModelIncoming

PAGES = 3000
KEEP = 20.0
QUICK = {"reconnect": 20.0, "chunk": 1 << 18, "connect_timeout": 5.0, "handover_timeout": 5.0}


class Receiver:
    """A destination that keeps what it has, on a real socket."""

    def __init__(self, keep: float) -> None:
        self.guest = ModelIncoming()
        self.keep = keep
        self.address = ""
        self.error: BaseException | None = None
        self.phases: list[Phase] = []
        self.on_phase: Callable[[Phase], None] = lambda _: None
        self.inbound: Inbound | None = None
        self.task: asyncio.Task[None] | None = None

    def _phase(self, phase: Phase) -> None:
        self.phases.append(phase)
        self.on_phase(phase)

    async def run(self, listener) -> None:  # type: ignore[no-untyped-def]
        self.inbound = Inbound(
            await listener.accept(), listener, self.guest, release="test", on_phase=self._phase, keep=self.keep
        )
        try:
            await self.inbound.run()
        except Exception as error:
            self.error = error
        finally:
            await self.inbound.close()

    def cut(self) -> None:
        """Break all connections."""
        assert self.inbound is not None
        for link in self.inbound._links:
            link.abort()


@asynccontextmanager
async def receiving(keep: float = KEEP) -> AsyncIterator[Receiver]:
    receiver = Receiver(keep)
    listener = await listen("tcp://127.0.0.1:0")
    receiver.address = listener.address
    receiver.task = asyncio.create_task(receiver.run(listener))
    try:
        yield receiver
        async with asyncio.timeout(20):
            await receiver.task
    finally:
        receiver.task.cancel()
        await asyncio.gather(receiver.task, return_exceptions=True)
        await listener.close()


def busy_guest() -> ModelGuest:
    """Every other page is full of what can't be compressed."""
    guest = ModelGuest(PAGES)
    guest.array.arrays[0][::2] = guest.random.integers(0, 255, (PAGES // 2, PAGE_SIZE), np.uint8)
    guest.write(np.arange(0, PAGES, 2))
    return guest


def assert_moved(guest: ModelGuest, receiver: Receiver) -> None:
    assert receiver.error is None
    assert guest.state is RunState.STOPPED
    assert receiver.guest.array is not None
    np.testing.assert_array_equal(receiver.guest.array.arrays[0], guest.array.arrays[0])


def assert_stayed(guest: ModelGuest) -> None:
    assert guest.state is RunState.RUNNING
    assert guest.hub.strategy is None, "the dirty log was left on"
    assert "commit" not in guest.calls


def cutting(receiver: Receiver, sent: list[int]) -> Callable[[Event], None]:
    """Cut when so many bytes have gone out, one after the other."""

    def on_event(event: Event) -> None:
        if sent and isinstance(event, Progress) and event.state is State.MEMORY and event.bytes_sent >= sent[0]:
            sent.pop(0)
            receiver.cut()

    return on_event


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("more", [{}, {"compression": "zstd"}, {"delta_cache": 1 << 30, "compression": "zstd"}])
async def test_a_migration_goes_on_after_its_connection_broke(streams: int, more: dict[str, object]) -> None:
    guest = busy_guest()
    dice = np.random.default_rng(5)

    def work() -> None:
        if guest.state is RunState.RUNNING and dice.integers(3) == 0:
            guest.write(dice.integers(0, PAGES, 20), zero=bool(dice.integers(2)))

    guest.before_take = work
    states: list[State] = []
    async with receiving() as receiver, asyncio.timeout(60):
        cut = cutting(receiver, [1 << 20, 3 << 20, 5 << 20])

        def on_event(event: Event) -> None:
            if isinstance(event, StateChanged):
                states.append(event.state)
            cut(event)

        policy = Policy(bandwidth=8e6, streams=streams, timeout=5, on_timeout="switch", **QUICK, **more)  # type: ignore[arg-type]
        async with Migration(guest, receiver.address, policy, on_event=on_event) as migration:
            pass
        result = await migration.result()
    assert_moved(guest, receiver)
    assert result.reconnects >= 1
    assert result.verified == "digests"
    assert states.count(State.RECONNECTING) == result.reconnects
    assert Phase.LOST in receiver.phases or result.reconnects
    assert receiver.guest.calls[0] == "build"
    assert receiver.guest.calls.count("build") == 1


async def test_what_had_arrived_is_not_sent_again() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    async with receiving() as receiver, asyncio.timeout(60):
        on_event = cutting(receiver, [2 << 20, 4 << 20, 6 << 20, 8 << 20])
        policy = Policy(bandwidth=8e6, **QUICK)  # type: ignore[arg-type]
        async with Migration(guest, receiver.address, policy, on_event=on_event) as migration:
            pass
        result = await migration.result()
    assert_moved(guest, receiver)
    assert result.reconnects == 4
    assert result.bytes.wire < 1.1 * PAGES * PAGE_SIZE


async def test_without_time_to_reconnect_a_lost_connection_is_the_end() -> None:
    guest = busy_guest()
    async with receiving() as receiver:
        policy = Policy(bandwidth=2e6, **(QUICK | {"reconnect": 0}))  # type: ignore[arg-type]
        with pytest.raises(LinkLost):
            async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1])):
                pass
    assert_stayed(guest)
    assert receiver.guest.calls == ["build", "discard"]


async def test_a_destination_that_keeps_nothing_ends_it_with_the_reason() -> None:
    guest = busy_guest()
    async with receiving(keep=0) as receiver:
        policy = Policy(bandwidth=2e6, **QUICK)  # type: ignore[arg-type]
        with pytest.raises(LinkLost, match="can't be reconnected: it does not keep what has come"):
            async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1])):
                pass
    assert_stayed(guest)
    assert receiver.guest.calls == ["build", "discard"]


async def test_a_destination_that_lost_patience_leaves_the_guest_here() -> None:
    guest = busy_guest()
    async with receiving(keep=0.01) as receiver:

        def slow(phase: Phase) -> None:
            if phase is Phase.LOST:
                assert receiver.inbound is not None
                receiver.inbound._door._listener = Nobody()  # type: ignore[union-attr, assignment]

        receiver.on_phase = slow
        policy = Policy(bandwidth=2e6, **(QUICK | {"reconnect": 0.5, "connect_timeout": 0.3}))  # type: ignore[arg-type]
        with pytest.raises(LinkLost, match=r"sought again for 0\.5 s"):
            async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1])):
                pass
    assert_stayed(guest)


class Nobody:
    async def accept(self) -> None:
        await asyncio.get_running_loop().create_future()
