"""The events of one migration on their way to whoever listens: bounded, state changes never dropped."""

from __future__ import annotations

import asyncio
from collections import deque

from amig.events import Event, Progress, RoundEnded

MAX_ROUNDS_KEPT = 256
"""Ended rounds that nobody has read; older ones are dropped."""


class EventStream:
    """One writer, one reader. Progress nobody has read is replaced by newer progress."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._rounds = 0
        self._closed = False
        self._wake = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event; never waits."""
        if isinstance(event, Progress) and self._events and isinstance(self._events[-1], Progress):
            self._events.pop()
        if isinstance(event, RoundEnded):
            self._rounds += 1
            if self._rounds > MAX_ROUNDS_KEPT:
                self._drop_oldest_round()
        self._events.append(event)
        self._wake.set()

    def _drop_oldest_round(self) -> None:
        for at, event in enumerate(self._events):
            if isinstance(event, RoundEnded):
                del self._events[at]
                self._rounds -= 1
                return

    def close(self) -> None:
        """Say that nothing follows."""
        self._closed = True
        self._wake.set()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        event = self._events.popleft()
        self._rounds -= isinstance(event, RoundEnded)
        return event
