"""Pages as they were last sent, so that a page that is sent again travels as what has changed in it.

The destination has exactly those versions in its memory: it takes the difference (XOR) and has the page. A page of
which one byte changed is a few bytes then. Only copies can be remembered: of a page that the kernel took from live
memory nobody knows which version it was.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amig.memory import PAGE_SIZE, Pages, Region
from amig.stages.items import PageIndex

Slots = npt.NDArray[np.int32]
NOWHERE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the pages of a block are remembered; each row of both arrays is a page of it."""

    slots: Slots
    """Slot in the cache, `NOWHERE` for a page that found no room."""
    known: npt.NDArray[np.bool_]
    """Whether a version is there that the destination has, too."""


class SentPages:
    """A cache of page versions, bounded in bytes. Looked up on one thread; filled by any, each page by one at a time.

    When it is full, the pages that were not sent in the round before this one make room: what is hot stays.
    """

    def __init__(self, regions: Iterable[Region], limit: int) -> None:
        regions = list(regions)
        needed = sum(region.pages for region in regions)
        self.capacity = min(limit // PAGE_SIZE, needed)
        self.roomy = self.capacity == needed
        """Whether it has room for every page, and so may start with the first round."""
        self._slot = {region.id: np.full(region.pages, NOWHERE, np.int32) for region in regions}
        self._seen = np.full(self.capacity, NOWHERE, np.int32)  # the round in which a slot's page was last sent
        self._page = np.zeros(self.capacity, np.int64)
        self._region = np.zeros(self.capacity, np.int64)
        self._used = 0
        self._free = np.empty(0, np.int32)  # slots whose pages were forgotten
        self._memory = mmap.mmap(-1, max(self.capacity, 1) * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # what is never used costs nothing, what is used few faults
        self._pages: Pages = np.frombuffer(self._memory, np.uint8).reshape(-1, PAGE_SIZE)

    def find(self, region: int, index: PageIndex, round_: int) -> Places:
        """Return where the pages are remembered, making room for those that are not; they count as sent now."""
        home = self._slot[region]
        slots = home[index]
        known = slots != NOWHERE
        self._seen[slots[known]] = round_  # first, so that none of them makes room for another
        missing = np.flatnonzero(~known)
        if len(missing):
            free = self._room(len(missing), round_)
            placed = missing[: len(free)]
            slots[placed] = free
            home[index[placed]] = free
            self._page[free] = index[placed]
            self._region[free] = region
            self._seen[free] = round_
        return Places(slots=slots, known=known)

    def forget(self, region: int, index: PageIndex) -> None:
        """The destination's version of these pages is another one now: zero, or one that nobody here knows."""
        slots = self._slot[region][index]
        gone = slots[slots != NOWHERE]
        self._slot[region][index] = NOWHERE
        self._seen[gone] = NOWHERE
        self._free = np.concatenate((gone, self._free))

    def exchange(self, slots: Slots, pages: Pages, old: Pages) -> Pages:
        """Remember ``pages`` and return how they differ from what was remembered, in ``old`` (as large, or larger)."""
        difference = old[: len(slots)]
        np.take(self._pages, slots, axis=0, out=difference, mode="clip")
        difference ^= pages
        self._pages[slots] = pages
        return difference

    def store(self, slots: Slots, pages: Pages) -> None:
        """Remember ``pages`` where there was nothing before."""
        self._pages[slots] = pages

    def _room(self, count: int, round_: int) -> Slots:
        slots, self._free = self._free[:count], self._free[count:]
        fresh = min(count - len(slots), self.capacity - self._used)
        slots = np.concatenate((slots, np.arange(self._used, self._used + fresh, dtype=np.int32)))
        self._used += fresh
        if len(slots) < count:
            seen = self._seen[: self._used - fresh]
            cold = np.flatnonzero((seen != NOWHERE) & (seen < round_ - 1))[: count - len(slots)].astype(np.int32)
            self._evict(cold)
            slots = np.concatenate((slots, cold))
        return slots

    def _evict(self, slots: Slots) -> None:
        for region, home in self._slot.items():
            pages = self._page[slots[self._region[slots] == region]]
            mine = slots[self._region[slots] == region]
            still = home[pages] == mine  # a page that was forgotten may have another slot by now
            home[pages[still]] = NOWHERE
