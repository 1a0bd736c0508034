"""Place: writes pages into the memory of the guest that arrives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

import numpy as np

from amig import bitmap
from amig.digest import PageDigests
from amig.guest import Incoming
from amig.memory import PAGE_SIZE, WORD_PAGES, Pages, Region, Words
from amig.pieces import Pieces
from amig.stages.ahead import BackingAhead
from amig.stages.buffers import BufferPool
from amig.stages.channel import ReceiveEnd
from amig.stages.gather import is_run, runs
from amig.stages.items import Block, Codec, PageIndex, RoundEnd
from amig.stages.resumption import Placement

MAX_POPULATED = 16
"""Runs of fresh pages in a block up to which they are backed by one call each before their data comes."""


class Place:
    """The last stage of the destination.

    A zero page is written only where something was placed before: fresh memory is zero, and touching it would allocate
    it.
    """

    def __init__(
        self,
        guest: Incoming,
        regions: Iterable[Region],
        pages: ReceiveEnd[Block | RoundEnd],
        *,
        pool: BufferPool,
        on_round: Callable[[int], Awaitable[None]],
        digests: PageDigests | None = None,
        placement: Placement | None = None,
    ) -> None:
        """``on_round`` is awaited when every page of a round is in place; ``placement`` outlives this object."""
        placement = placement or Placement(regions)
        self._guest = guest
        self._in = pages
        self._pool = pool
        self._on_round = on_round
        self._digests = digests
        self._memory: Mapping[int, Pages] = {region.id: guest.pages(region.id) for region in regions}
        self._placement = placement
        self._placed: Mapping[int, Words] = placement.content
        self._current = placement.current
        self._ahead = BackingAhead(regions, guest.populate)
        self._rounds = placement.rounds
        self.pages_placed = 0
        self.pages_zero = 0

    async def run(self) -> None:
        """Place until the input ends."""
        try:
            async for item in self._in:
                if isinstance(item, RoundEnd):
                    if item.round == 0:
                        await self._give_back()
                    self._rounds = item.round + 1
                    self._placement.end_round(item.round)
                    await self._on_round(item.round)
                    continue
                self._place(item)
                if item.buffer is not None:
                    self._pool.release(item.buffer)
            if self._rounds == 0:  # the connection was lost before the first round's end
                await self._give_back()
        finally:
            self._ahead.close()

    def spoil(self, region: int, first: int, landed: Words) -> None:
        """See `amig.stages.receive.Landing`: what did not land whole must never be taken for what was sent."""
        if self._current is None:
            return
        memory = self._memory[region]
        fresh = landed & ~self._placed[region][first // WORD_PAGES : first // WORD_PAGES + len(landed)]
        memory[bitmap.to_pages(fresh, first)] = 0  # as if nothing had come: what is a hole by now is not sent again
        older = bitmap.to_pages(landed & ~fresh, first)
        if len(older) and self._digests is not None:
            self._digests.hash(region, memory, older)

    def land(self, round_: int, region: int, first: int, fresh: Words) -> Pieces | None:
        """See `amig.stages.receive.Landing`: yes, once nothing of an older round waits to be placed over it."""
        if round_ != self._rounds:
            return None
        index = bitmap.to_pages(fresh, first)
        if round_ == 0 and is_run(index):
            self._ahead.came(region, int(index[0]), int(index[-1]) + 1)
        self._back(region, first, fresh)
        return Pieces(self._memory[region], index)

    def _back(self, region: int, first: int, fresh: Words) -> None:
        """Have fresh memory backed run by run, where there are few."""
        if not self._ahead.needed:
            return
        at = slice(first // WORD_PAGES, first // WORD_PAGES + len(fresh))
        bits = self._ahead.missing(region, first, fresh & ~self._placed[region][at])
        if not bits.any():
            return
        untouched = runs(bitmap.to_pages(bits, first))
        if len(untouched) <= MAX_POPULATED:
            for start, end in untouched:
                self._guest.populate(region, start, end - start)

    async def _give_back(self) -> None:
        """Punch what was backed ahead and never came: no block of the next round can land before this returns."""
        for region, backed in (await self._ahead.backed()).items():
            first, count = bitmap.runs(backed & ~self._placed[region])
            for start, pages in zip(first.tolist(), count.tolist(), strict=True):
                self._guest.punch(region, start, pages)

    def _place(self, block: Block) -> None:
        memory = self._memory[block.region]
        at = slice(block.first // WORD_PAGES, block.first // WORD_PAGES + len(block.pages))
        placed = self._placed[block.region][at]
        stale = block.zero & placed
        if block.zero_pages and stale.any():
            index = bitmap.to_pages(stale, block.first)
            memory[index] = 0
            if self._digests is not None:
                self._digests.zero(block.region, index)
            placed &= ~stale
        if block.data_pages:
            fresh = block.pages & ~block.zero
            placed |= fresh
            if block.data is not None or self._digests is not None:
                self._fill(block, memory, bitmap.to_pages(fresh, block.first) if block.index is None else block.index)
        if self._current is not None:
            self._current[block.region][at] |= block.pages
        self.pages_placed += block.data_pages
        self.pages_zero += block.zero_pages

    def _fill(self, block: Block, memory: Pages, index: PageIndex) -> None:
        """Write the block's content, unless it has landed there, and take the digests of what is there now."""
        if block.data is not None:
            assert isinstance(block.data, memoryview)  # noqa: S101 - what has landed has none
            if block.round == 0 and is_run(index):
                self._ahead.came(block.region, int(index[0]), int(index[-1]) + 1)
            content = np.frombuffer(block.data, np.uint8).reshape(-1, PAGE_SIZE)
            where = slice(int(index[0]), int(index[-1]) + 1) if is_run(index) else index
            if block.codec is Codec.XOR:
                memory[where] ^= content
            else:
                memory[where] = content
        if self._digests is not None:
            self._digests.hash(block.region, memory, index)
