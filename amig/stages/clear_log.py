"""Clear: takes an extent's dirty bits and clears them in the kernel, just before its pages are read."""

from __future__ import annotations

import time

from amig.guest import Guest
from amig.stages.channel import ReceiveEnd, SendEnd
from amig.stages.items import Chunk, Extent, RoundEnd
from amig.stages.ledger import Ledger
from amig.stats import MigrationStats


class ClearLog:
    """The second stage of the source.

    It clears an extent only when the reader waits for the next chunk, so that nothing lies around cleared and unread:
    that time is the window in which a page can be dirtied again.
    """

    def __init__(
        self,
        guest: Guest,
        extents: ReceiveEnd[Extent | RoundEnd],
        chunks: SendEnd[Chunk | RoundEnd],
        *,
        ledger: Ledger,
        stats: MigrationStats,
    ) -> None:
        self._guest = guest
        self._in = extents
        self._out = chunks
        self._ledger = ledger
        self._stats = stats

    async def run(self) -> None:
        """Turn extents into chunks until the input ends. Cancelling loses no bits: the guest takes them back."""
        async with self._out:
            async for item in self._in:
                if isinstance(item, RoundEnd):
                    self._ledger.all_taken(item.round)
                    await self._out.send(item, 0)
                else:
                    await self._out.wanted()
                    await self._out.send(await self._clear(item), item.size)

    async def _clear(self, extent: Extent) -> Chunk:
        begin = time.monotonic_ns()
        words = await self._guest.take_and_clear(extent.region, extent.first, extent.count)
        self._stats.take_ns += time.monotonic_ns() - begin
        self._stats.chunks += 1
        self._stats.pages_resent += self._ledger.take(extent.round, extent.region, extent.first, words)
        return Chunk(extent=extent, words=words, cleared_ns=begin)
