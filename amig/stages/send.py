"""Send: puts blocks on the connections, at most at the rate allowed, each round's end on every one of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from amig.memory import PAGE_SIZE
from amig.stages.buffers import BufferPool
from amig.stages.channel import ReceiveEnd
from amig.stages.items import Block, RoundEnd
from amig.stats import MigrationStats


class BlockSink(Protocol):
    """A connection, as the sender sees it."""

    live: bool
    """Whether it can take pages straight from guest memory, without looking at them twice."""

    async def send_block(self, block: Block) -> int:
        """Send a block and return its bytes on the wire; its buffers may be reused afterwards."""

    async def send_round(self, end: RoundEnd) -> None:
        """Say that no more blocks of this round will come on this connection."""


class Throttle(Protocol):
    """Holds the sender to the operator's bandwidth."""

    async def take(self, size: int) -> None:
        """Return when ``size`` more bytes may be sent."""


class Send:
    """The last stage of the source: one task a connection, all taking from one channel.

    Within a round no page is sent twice, so a block may take any connection. Each connection takes one `RoundEnd`, says
    it, and waits for the others: none starts on the next round before all have ended this one.
    """

    def __init__(
        self,
        blocks: ReceiveEnd[Block | RoundEnd],
        sinks: Sequence[BlockSink],
        *,
        throttle: Throttle,
        pool: BufferPool,
        stats: MigrationStats,
    ) -> None:
        self._in = blocks
        self._sinks = sinks
        self._throttle = throttle
        self._pool = pool
        self._stats = stats
        self._barrier = asyncio.Barrier(len(sinks))

    async def run(self) -> None:
        """Send until the input ends. A connection that breaks raises `LinkLost`."""
        async with asyncio.TaskGroup() as group:
            for sink in self._sinks:
                group.create_task(self._feed(sink))

    async def _feed(self, sink: BlockSink) -> None:
        stats = self._stats
        async for item in self._in:
            if isinstance(item, RoundEnd):
                await sink.send_round(item)
                await self._barrier.wait()
                continue
            # The kernel's copy keeps this thread busy; who asks the host for the next chunk goes first, so that the
            # host clears while we copy.
            await asyncio.sleep(0)
            stats.link.begin(time.monotonic_ns())
            sent = 0
            try:
                await self._throttle.take(item.size)
                sent = await sink.send_block(item)
            finally:
                now = time.monotonic_ns()
                stats.link.end(now, sent, item.data_pages * PAGE_SIZE if sent else 0)
                if item.buffer is not None:
                    self._pool.release(item.buffer)
            if item.cleared_ns:
                stats.window.record(now - item.cleared_ns)
            stats.bytes_wire += sent
