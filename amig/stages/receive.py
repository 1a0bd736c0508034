"""Receive: takes frames off the connections and keeps the rounds apart."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from amig.errors import LinkLost
from amig.memory import Pages, Words
from amig.pieces import Pieces
from amig.stages.buffers import BufferPool
from amig.stages.channel import SendEnd
from amig.stages.items import Block, RoundEnd


class Landing(Protocol):
    """Where raw content may be received to without a stop in between."""

    def land(self, round_: int, region: int, first: int, fresh: Words) -> Pieces | None:
        """Return the guest memory of the pages whose bits are set, bit 0 being page ``first``; None for "not now"."""

    def spoil(self, region: int, first: int, landed: Words) -> None:
        """Take note that such content has been written, in part or whole, and will never be placed."""


class BlockSource(Protocol):
    """A connection, as the receiver sees it."""

    async def receive(self, buffer: Pages, landing: Landing) -> Block | RoundEnd | None:
        """Return what comes next; None when everything has been sent.

        A block's content lies in ``buffer``, which is then the block's, or has landed in guest memory.

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
        blocks: SendEnd[Block | RoundEnd],
        *,
        pool: BufferPool,
        landing: Landing,
        keeps: bool = False,
    ) -> None:
        """``keeps``: a lost connection is no error but the end: what came before is passed on, see `lost`."""
        self._keeps = keeps
        self.lost = ""
        """Why it ended before everything had been received; the error itself would hold on to all of its frames."""
        self._landing = landing
        self._sources = sources
        self._out = blocks
        self._pool = pool
        self._barrier = asyncio.Barrier(len(sources))

    async def run(self) -> None:
        """Receive until the first connection says that everything has been sent."""
        async with self._out:
            try:
                await self._receive()
            except* LinkLost as group:
                if not self._keeps:
                    raise
                self.lost = str(_first(group))

    async def _receive(self) -> None:
        async with asyncio.TaskGroup() as group:
            others = [group.create_task(self._drain(source)) for source in self._sources[1:]]
            await self._drain(self._sources[0])
            for other in others:
                other.cancel()

    async def _drain(self, source: BlockSource) -> None:
        buffer = await self._pool.acquire()
        try:
            while (item := await source.receive(buffer, self._landing)) is not None:
                if isinstance(item, RoundEnd):
                    # The first of the barrier's two passes says that all are here, the second that the mark is out.
                    if await self._barrier.wait() == 0:
                        await self._out.send(item, 0)
                    await self._barrier.wait()
                else:
                    try:
                        await self._out.send(item, item.size)
                    except BaseException:
                        if item.data is None and item.data_pages:
                            self._landing.spoil(item.region, item.first, item.pages & ~item.zero)
                        raise
                    if item.buffer is not None:
                        buffer = await self._pool.acquire()
        finally:
            self._pool.release(buffer)


def _first(group: BaseExceptionGroup[LinkLost]) -> LinkLost:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, LinkLost)  # noqa: S101 - there is nothing else in the group
    return error
