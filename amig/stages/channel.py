"""Queues between stages, bounded in bytes, with two ends and a clean close.

``channel(limit)`` returns a sending and a receiving end on one private state. A sender waits while the channel holds
more than ``limit`` bytes; an item larger than that enters only an empty channel, so it passes but never piles up. When
the sending end is closed the receiver drains what is left and then ends its ``async for``; when the receiving end is
closed the sender gets `BrokenChannel`. Errors never travel through a channel: the task group that runs the stages
carries them.

Cancelling a ``send`` leaves its item out; cancelling a receiver never loses an item.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class BrokenChannel(Exception):
    """The receiving end is closed: nobody will take the item. Seen only inside a pipeline that is ending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStatistics:
    """A look into a channel, for tests and progress."""

    items: int
    used: int
    """Bytes held now."""
    limit: int
    high_water: int
    """Most bytes ever held at once."""
    total: int
    """Bytes that went in since the start."""


class _State(Generic[T]):
    __slots__ = (
        "getters",
        "high_water",
        "hungry",
        "items",
        "limit",
        "putters",
        "receiving",
        "sending",
        "total",
        "used",
    )

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.items: deque[tuple[T, int]] = deque()
        self.used = 0
        self.high_water = 0
        self.total = 0
        self.sending = True
        self.receiving = True
        self.getters: deque[asyncio.Future[None]] = deque()
        self.putters: deque[asyncio.Future[None]] = deque()
        self.hungry: deque[asyncio.Future[None]] = deque()

    def wake(self, waiters: deque[asyncio.Future[None]], *, everyone: bool = False) -> None:
        while waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                if not everyone:
                    return

    async def wait(self, waiters: deque[asyncio.Future[None]]) -> None:
        waiter = asyncio.get_running_loop().create_future()
        waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.wake(waiters)  # we were chosen and can't use it: pass it on
            elif waiter in waiters:
                waiters.remove(waiter)
            raise

    def fits(self, size: int) -> bool:
        return not self.items or self.used + size <= self.limit


class SendEnd(Generic[T]):
    """Where a stage puts its output; an async context manager that closes on a clean end."""

    def __init__(self, state: _State[T]) -> None:
        self._state = state

    async def send(self, item: T, size: int) -> None:
        """Put an item of ``size`` bytes in, waiting for room. Raises `BrokenChannel` when nobody listens."""
        state = self._state
        if not state.sending:
            raise RuntimeError("send on a channel that was closed")
        while True:
            if not state.receiving:
                raise BrokenChannel
            if state.fits(size) and not state.putters:
                break
            await state.wait(state.putters)
            if state.fits(size):
                break
        if not state.receiving:
            raise BrokenChannel
        state.items.append((item, size))
        state.used += size
        state.total += size
        state.high_water = max(state.high_water, state.used)
        state.wake(state.getters)
        if state.putters and state.used < state.limit:
            state.wake(state.putters)

    async def wanted(self) -> None:
        """Wait until the receiver waits for an item: what is sent now is worked on at once."""
        state = self._state
        while state.items or not state.getters:
            if not state.receiving:
                raise BrokenChannel
            await state.wait(state.hungry)
        if not state.receiving:
            raise BrokenChannel

    def close(self) -> None:
        """Say that nothing follows. Idempotent."""
        self._state.sending = False
        self._state.wake(self._state.getters, everyone=True)

    async def __aenter__(self) -> SendEnd[T]:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # on an error the task group ends the receiver; a close would look like a clean end
            self.close()

    def statistics(self) -> ChannelStatistics:
        """Return how full the channel is and was."""
        return _statistics(self._state)


class ReceiveEnd(Generic[T]):
    """Where a stage takes its input: ``async for item in end``. Several tasks may take from one end."""

    def __init__(self, state: _State[T]) -> None:
        self._state = state

    def __aiter__(self) -> ReceiveEnd[T]:
        return self

    async def __anext__(self) -> T:
        state = self._state
        while not state.items:
            if not state.sending:
                raise StopAsyncIteration
            state.wake(state.hungry, everyone=True)
            await state.wait(state.getters)
        item, size = state.items.popleft()
        state.used -= size
        state.wake(state.putters)
        if state.items:
            state.wake(state.getters)
        return item

    def close(self) -> None:
        """Say that nobody listens; what is inside is dropped. Idempotent."""
        state = self._state
        state.receiving = False
        state.items.clear()
        state.used = 0
        state.wake(state.putters, everyone=True)
        state.wake(state.hungry, everyone=True)

    def statistics(self) -> ChannelStatistics:
        """Return how full the channel is and was."""
        return _statistics(self._state)


def _statistics(state: _State[T]) -> ChannelStatistics:
    return ChannelStatistics(
        items=len(state.items), used=state.used, limit=state.limit, high_water=state.high_water, total=state.total
    )


def channel(limit: int) -> tuple[SendEnd[T], ReceiveEnd[T]]:
    """Return the two ends of a new channel that holds at most ``limit`` bytes, or one larger item."""
    if limit <= 0:
        raise ValueError("a channel needs room for something")
    state: _State[T] = _State(limit)
    return SendEnd(state), ReceiveEnd(state)
