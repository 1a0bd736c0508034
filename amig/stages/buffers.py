"""A fixed set of page buffers: what bounds the memory that a pipeline holds."""

from __future__ import annotations

import asyncio
from collections import deque

import numpy as np

from amig.memory import PAGE_SIZE, Pages
from amig.stages.items import BLOCK_PAGES


class BufferPool:
    """``count`` buffers of one block each. A buffer is free again once it was released; waiting is first come."""

    def __init__(self, count: int) -> None:
        if count < 2:
            raise ValueError("a pipeline needs two buffers to move")
        self.count = count
        self._free = deque(np.zeros((BLOCK_PAGES, PAGE_SIZE), np.uint8) for _ in range(count))
        self._available = asyncio.Semaphore(count)

    async def acquire(self) -> Pages:
        """Return a buffer of shape ``(BLOCK_PAGES, PAGE_SIZE)``; waits until one is free."""
        await self._available.acquire()
        return self._free.popleft()

    def release(self, buffer: Pages) -> None:
        """Give a buffer back."""
        self._free.append(buffer)
        self._available.release()

    def close(self) -> None:
        """Let go of the buffers that nobody holds: who keeps the pipeline's error keeps the pipeline."""
        self._free.clear()

    @property
    def free(self) -> int:
        """Buffers nobody holds."""
        return len(self._free)
