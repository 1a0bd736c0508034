"""A limit on bytes per second, shared by the connections of a migration and adjustable while it runs."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

BURST_SECONDS: Final = 0.005
"""Unused rate is kept for so long: it makes up for a late wake-up, and no more."""
BURST_BYTES: Final = 1 << 20
"""The least that may be kept: one block."""


class TokenBucket:
    """The arithmetic, with time passed in: seconds on any clock that does not go backwards.

    What is sent is taken out of the bucket at once, even below zero; who comes next waits until it is not in debt any
    more. So a block of any size passes at any rate, and the rate is kept over every longer time.
    """

    def __init__(self, rate: float | None, now: float) -> None:
        """``rate`` in bytes per second; None does not limit."""
        self._rate = _checked(rate)
        self._tokens = 0.0
        self._at = now

    @property
    def rate(self) -> float | None:
        """Bytes per second; None when unlimited."""
        return self._rate

    def set_rate(self, rate: float | None, now: float) -> None:
        """Change the rate from ``now`` on; what is owed is paid off at the new one."""
        self._refill(now)
        self._rate = _checked(rate)
        if self._rate is None:
            self._tokens = 0.0

    def wait(self, now: float) -> float:
        """Return the seconds until something may be sent; 0 when it may be now."""
        self._refill(now)
        if self._rate is None or self._tokens >= 0:
            return 0.0
        return -self._tokens / self._rate

    def spend(self, size: int, now: float) -> None:
        """Note that ``size`` bytes are sent now."""
        self._refill(now)
        if self._rate is not None:
            self._tokens -= size

    def _refill(self, now: float) -> None:
        elapsed, self._at = max(0.0, now - self._at), max(now, self._at)
        if self._rate is not None:
            most = max(BURST_BYTES, self._rate * BURST_SECONDS)
            self._tokens = min(most, self._tokens + elapsed * self._rate)


class RateLimiter:
    """Tasks that send take their turn here, first come first served."""

    def __init__(self, rate: float | None) -> None:
        """``rate`` in bytes per second; None does not limit."""
        self._loop = asyncio.get_running_loop()
        self._bucket = TokenBucket(rate, self._loop.time())
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def rate(self) -> float | None:
        """Bytes per second; None when unlimited."""
        return self._bucket.rate

    def set_rate(self, rate: float | None) -> None:
        """Change the rate; who waits now waits by the new one."""
        self._bucket.set_rate(rate, self._loop.time())
        self._changed.set()

    async def take(self, size: int) -> None:
        """Return when ``size`` more bytes may be sent. Cancelled, it has taken nothing."""
        if self._bucket.rate is None and not self._turn.locked():
            return
        async with self._turn:
            while (delay := self._bucket.wait(self._loop.time())) > 0:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._changed.wait()
            self._bucket.spend(size, self._loop.time())


def _checked(rate: float | None) -> float | None:
    if rate is not None and not rate > 0:
        raise ValueError(f"a rate of {rate} bytes per second")
    return rate
