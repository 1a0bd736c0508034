"""Receive: takes frames off the connections and keeps the rounds apart."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from amig.memory import Pages
from amig.stages.buffers import BufferPool
from amig.stages.channel import SendEnd
from amig.stages.items import Block, RoundEnd


class BlockSource(Protocol):
    """A connection, as the receiver sees it."""

    async def receive(self, buffer: Pages) -> Block | RoundEnd | None:
        """Return what comes next, a block's content lying in ``buffer``; None when everything has been sent.

        None comes on the first connection only; the others stay open and silent after the last round.
        """


class Receive:
    """The first stage of the destination: one task a connection.

    A connection that has reached the end of a round is not read on until all have: so nothing of the next round can be
    placed before, or under, a page of this one.
    """

    def __init__(
        self,
        sources: Sequence[BlockSource],
        blocks: SendEnd[tuple[Block, Pages] | RoundEnd],
        *,
        pool: BufferPool,
    ) -> None:
        self._sources = sources
        self._out = blocks
        self._pool = pool
        self._barrier = asyncio.Barrier(len(sources))

    async def run(self) -> None:
        """Receive until the first connection says that everything has been sent."""
        async with self._out, asyncio.TaskGroup() as group:
            others = [group.create_task(self._drain(source)) for source in self._sources[1:]]
            await self._drain(self._sources[0])
            for other in others:
                other.cancel()

    async def _drain(self, source: BlockSource) -> None:
        buffer = await self._pool.acquire()
        try:
            while (item := await source.receive(buffer)) is not None:
                if isinstance(item, RoundEnd):
                    # The first of the barrier's two passes says that all are here, the second that the mark is out.
                    if await self._barrier.wait() == 0:
                        await self._out.send(item, 0)
                    await self._barrier.wait()
                else:
                    await self._out.send((item, buffer), item.data.nbytes)
                    buffer = await self._pool.acquire()
        finally:
            self._pool.release(buffer)
