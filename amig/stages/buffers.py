"""A bounded set of page buffers: what bounds the memory that a pipeline holds."""

from __future__ import annotations

import asyncio
from collections import deque

import numpy as np

from amig.memory import PAGE_SIZE, Pages
from amig.stages.items import BLOCK_PAGES


class BufferPool:
    """At most ``count`` buffers of one block each, made when they are first needed; waiting for one is first come.

    Raw pages go from guest memory to guest memory, so a migration without compression needs none but those it is
    polite to have at hand.
    """

    def __init__(self, count: int) -> None:
        if count < 2:
            raise ValueError("a pipeline needs two buffers to move")
        self.count = count
        self._free: deque[Pages] = deque()
        self._held = 0
        self._available = asyncio.Semaphore(count)

    async def acquire(self) -> Pages:
        """Return a buffer of shape ``(BLOCK_PAGES, PAGE_SIZE)``; waits until one is free."""
        await self._available.acquire()
        self._held += 1
        return self._free.popleft() if self._free else np.empty((BLOCK_PAGES, PAGE_SIZE), np.uint8)

    def release(self, buffer: Pages) -> None:
        """Give a buffer back."""
        self._free.append(buffer)
        self._held -= 1
        self._available.release()

    def close(self) -> None:
        """Let go of the buffers that nobody holds: who keeps the pipeline's error keeps the pipeline."""
        self._free.clear()

    @property
    def free(self) -> int:
        """Buffers nobody holds."""
        return self.count - self._held
