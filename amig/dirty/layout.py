"""Translation between regions, which bitmaps address, and slots, which the kernel keeps logs for.

A slot shows a part of a region and may start at any page of it, so its bits are shifted against the region's. KVM wants
CLEAR aligned to 64 pages *of the slot*; the ranges asked for are ranges of a region. A rounded range gets zeros where
it goes beyond what was asked for, so that the rounding clears nothing (design rule 3). A page seen through several
slots is cleared in all of them (rule 4).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from amig import bitmap
from amig.memory import PAGE_SIZE, WORD_PAGES, MemoryMap, Slot, Words


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of one slot, as CLEAR takes it."""

    slot: int
    first: int
    """A multiple of 64, in pages of the slot."""
    count: int
    """A multiple of 64, unless it ends the slot."""
    words: Words


class Layout:
    """The slots of one memory map, found by region and page. Immutable."""

    def __init__(self, memory_map: MemoryMap) -> None:
        self.map = memory_map
        self.pages = {region.id: region.pages for region in memory_map.regions}
        self._edges: dict[int, list[int]] = {}
        self._seen: dict[int, list[tuple[Slot, ...]]] = {}
        for region in memory_map.regions:
            here = [slot for slot in memory_map.slots if slot.region == region.id]
            edges = sorted({0} | {start(slot) for slot in here} | {start(slot) + slot.pages for slot in here})
            self._edges[region.id] = edges
            self._seen[region.id] = [
                tuple(slot for slot in here if start(slot) <= edge < start(slot) + slot.pages) for edge in edges
            ]

    @property
    def generation(self) -> int:
        """Number of the map."""
        return self.map.generation

    def slots_of(self, region: int, first: int, count: int) -> tuple[Slot, ...]:
        """Return every slot that shows any page of a range, each once."""
        edges, seen = self._edges[region], self._seen[region]
        low = bisect_right(edges, first) - 1
        high = bisect_right(edges, first + count - 1)
        if high - low == 1:
            return seen[low]
        return tuple(dict.fromkeys(slot for part in seen[low:high] for slot in part))

    def pieces(self, region: int, first: int, count: int, wanted: Words) -> Iterator[Piece]:
        """Yield what to give to CLEAR so that exactly the pages set in ``wanted`` are cleared, in every slot.

        ``wanted`` is a bitmap of the region's pages ``first`` to ``first + count - 1``. Slots with nothing to clear are
        left out.
        """
        for slot in self.slots_of(region, first, count):
            home = start(slot)
            low = max(first, home)
            high = min(first + count, home + slot.pages)
            words = bitmap.extract(wanted, low - first, high - low)
            if not words.any():
                continue
            into, shift = divmod(low - home, WORD_PAGES)
            if shift:
                words = bitmap.spread(words, shift, high - low)
            begin = into * WORD_PAGES
            yield Piece(
                slot=slot.index, first=begin, count=min(words.size * WORD_PAGES, slot.pages - begin), words=words
            )


def start(slot: Slot) -> int:
    """Return the page of its region at which a slot starts."""
    return slot.offset // PAGE_SIZE
