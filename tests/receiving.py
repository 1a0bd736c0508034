"""One destination on a real socket, with a model guest: what the tests of whole migrations in one process share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np

from amig.guest import RunState
from amig.memory import PAGE_SIZE
from amig.policy import STALL
from amig.session.inbound import Inbound, Phase
from amig.session.questions import Records
from amig.transport import Listener, listen
from tests.modelguest import ModelGuest, ModelIncoming

PAGES = 3000


class Nobody:
    """A listener to which nobody comes any more."""

    async def accept(self) -> None:
        await asyncio.get_running_loop().create_future()


class Receiver:
    """A destination; with ``keep``, one that keeps what it has for so many seconds when the connection is lost."""

    def __init__(self, guest: ModelIncoming, keep: float, *, deaf: bool) -> None:
        """``deaf``: it hears nobody after the first connection."""
        self.guest = guest
        self.keep = keep
        self.stall = STALL
        self.records = Records()
        self.deaf = deaf
        self.address = ""
        self.error: BaseException | None = None
        self.phases: list[Phase] = []
        self.on_phase: Callable[[Phase], None] = lambda _: None
        self.inbound: Inbound | None = None
        self.task: asyncio.Task[None] | None = None

    def _phase(self, phase: Phase) -> None:
        self.phases.append(phase)
        self.on_phase(phase)

    async def run(self, listener: Listener) -> None:
        self.inbound = Inbound(
            await listener.accept(),
            Nobody() if self.deaf else listener,  # type: ignore[arg-type]
            self.guest,
            release="test",
            on_phase=self._phase,
            keep=self.keep,
            keepalive=self.stall / 4,
            stall=self.stall,
            records=self.records,
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
async def receiving(
    address: str = "tcp://127.0.0.1:0", guest: ModelIncoming | None = None, *, keep: float = 0.0, deaf: bool = False
) -> AsyncIterator[Receiver]:
    """Wait for one migration; afterwards it must have ended soon, in whatever way."""
    receiver = Receiver(guest or ModelIncoming(), keep, deaf=deaf)
    listener = await listen(address)
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
    """Every other page is full of what can't be compressed, and dirty."""
    guest = ModelGuest(PAGES)
    guest.array.arrays[0][::2] = guest.random.integers(0, 255, (PAGES // 2, PAGE_SIZE), np.uint8)
    guest.write(np.arange(0, PAGES, 2))
    return guest


def assert_moved(guest: ModelGuest, receiver: Receiver) -> None:
    assert receiver.error is None
    assert guest.state is RunState.STOPPED
    assert receiver.guest.calls == ["build", "load", "commit", "run", "settle"]
    assert receiver.guest.array is not None
    np.testing.assert_array_equal(receiver.guest.array.arrays[0], guest.array.arrays[0])


def assert_stayed(guest: ModelGuest) -> None:
    assert guest.state is RunState.RUNNING
    assert guest.hub.strategy is None, "the dirty log was left on"
    assert "commit" not in guest.calls
