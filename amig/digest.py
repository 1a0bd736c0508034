"""Digests of pages: what both sides keep of every page, and compare before the guest may run. Pure.

A page's digest is XXH3-64 under a key that the source makes for each migration, so that nothing in a guest can be made
to collide; a page of zeros has the digest 0 and is not hashed. The source takes it from live memory at any time after
the clear: a page that changes later is dirty, comes again, and its digest is replaced. The destination takes it from
where the page was placed. So nothing is compared before the final versions are in place, and then only the *roots*: one
64-bit number for each range of pages, the sum of its digests, each times 2 x page + 1, modulo 2^64. A sum can be kept
up to date with every page that comes, in any order, so that nothing is left to be hashed while the guest waits; the
factor, odd so that it loses nothing, tells pages that have changed places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from amig.errors import MigrationError
from amig.memory import PAGE_SIZE, Pages, Region

Verify = Literal["digests", "full", "off"]
"""How a migration is verified: by digests of pages as sent and as placed; by these and by hashing all memory of both
sides again while the guest is paused; or not at all."""

KEY_BYTES = 8
MAX_ROOTS = 4096
"""Most roots of a guest; ranges grow with it."""
MIN_RANGE_PAGES = 1024
"""Pages that a root stands for, 4 MiB, as long as there are no more than `MAX_ROOTS`."""

_HOT_PAGES = 256
"""Pages tested for zero and then hashed at a time: still in the cache for the second."""

Digests = npt.NDArray[np.uint64]
"""Digests of consecutive pages."""

_hash = xxhash.xxh3_64_intdigest


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PageRange:
    """Consecutive pages of a region."""

    region: int
    first: int
    count: int

    def __str__(self) -> str:
        if self.count == 1:
            return f"page {self.first} of region {self.region}"
        return f"pages {self.first} to {self.first + self.count - 1} of region {self.region}"


def named(ranges: Iterable[PageRange], most: int = 8) -> str:
    """Return ranges for people; all after the first few only counted."""
    listed = list(ranges)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(map(str, listed[:most])) + more


def hash_pages(memory: Pages, index: npt.NDArray[np.int64], key: int) -> Digests:
    """Return the digests of the pages in ``index`` (ascending) as they are now; zero pages aren't told apart here."""
    count = len(index)
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == count:
        return np.fromiter(map(_hash, memory[first : last + 1], repeat(key)), np.uint64, count)
    flat = memory.reshape(-1).data
    found = [_hash(flat[at : at + PAGE_SIZE], key) for at in (index * PAGE_SIZE).tolist()]
    return np.array(found, np.uint64)


def hash_all(memory: Pages, first: int, present: npt.NDArray[np.bool_], key: int) -> Digests:
    """Return the digests of ``len(present)`` pages from ``first`` on; those not ``present`` are holes, and not read."""
    digests = np.zeros(len(present), np.uint64)
    index = np.flatnonzero(present) + first
    for start in range(0, len(index), _HOT_PAGES):
        part = index[start : start + _HOT_PAGES]
        run = int(part[-1]) - int(part[0]) + 1 == len(part)
        content = memory[part[0] : part[-1] + 1] if run else memory[part]
        part = part[np.bitwise_or.reduce(content.view(np.uint64), axis=1) != 0]
        if len(part):
            digests[part - first] = hash_pages(memory, part, key)
    return digests


def present(pages: int, data: Iterable[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Return which pages of a region aren't holes; ``data`` are the runs, (first, pages), of those."""
    found = np.zeros(pages, np.bool_)
    for first, count in data:
        found[first : first + count] = True
    return found


class PageDigests:
    """The digest of every page of a guest as it was sent, or placed, last; 8 bytes a page."""

    def __init__(self, regions: Iterable[Region], key: int) -> None:
        """All pages count as zero. Raises `MigrationError` when there is no memory for that."""
        self._key = key
        self._regions = tuple(regions)
        self._range = range_pages(self._regions)
        try:
            self._tables = {region.id: np.zeros(region.pages, np.uint64) for region in self._regions}
        except MemoryError:
            pages = sum(region.pages for region in self._regions)
            raise MigrationError(f"there is no memory for the digests of {pages} pages (--verify off)") from None
        self._roots = {r.id: np.zeros(-(-r.pages // self._range), np.uint64) for r in self._regions}

    def hash(self, region: int, memory: Pages, index: npt.NDArray[np.int64]) -> None:
        """Take the digests of the pages in ``index`` (ascending, not empty) from the region's memory as it is now."""
        self._replace(region, index, hash_pages(memory, index, self._key))

    def zero(self, region: int, index: npt.NDArray[np.int64]) -> None:
        """Note that the pages in ``index`` (ascending, not empty) are zero."""
        first, last = int(index[0]), int(index[-1])
        if last - first + 1 == len(index) and not self._tables[region][first : last + 1].any():
            return  # as they were: most memory that is zero has never been anything else
        self._replace(region, index, np.zeros(len(index), np.uint64))

    def _replace(self, region: int, index: npt.NDArray[np.int64], digests: Digests) -> None:
        """Put digests in place of others, and what that changes into the roots: they are ready at any time."""
        table, roots = self._tables[region], self._roots[region]
        first, last = int(index[0]), int(index[-1])
        where = slice(first, last + 1) if last - first + 1 == len(index) else index
        change = digests - table[where]
        table[where] = digests
        change *= (2 * index + 1).view(np.uint64)
        low, high = first // self._range, last // self._range
        if low == high:
            roots[low : low + 1] += change.sum(dtype=np.uint64)
        else:
            np.add.at(roots, index // self._range, change)

    def roots(self) -> bytes:
        """Return the roots of all ranges, 8 bytes each, region by region."""
        return b"".join([self._roots[region.id].astype("<u8").tobytes() for region in self._regions])

    def differing(self, theirs: bytes) -> list[PageRange]:
        """Return the ranges whose roots differ from those of the other side; all of them if it has another number."""
        ours = self.roots()
        if ours == theirs:
            return []
        mine = np.frombuffer(ours, "<u8")
        other = np.frombuffer(theirs, "<u8") if len(theirs) == mine.nbytes else ~mine
        return [where for where, same in zip(self._ranges(), (mine == other).tolist(), strict=True) if not same]

    def _ranges(self) -> Iterator[PageRange]:
        for region in self._regions:
            for first in range(0, region.pages, self._range):
                yield PageRange(region=region.id, first=first, count=min(self._range, region.pages - first))


def range_pages(regions: Iterable[Region]) -> int:
    """Return how many pages a root stands for: a power of two, the same on both sides."""
    sizes = [region.pages for region in regions]
    pages = MIN_RANGE_PAGES
    while sum(-(-size // pages) for size in sizes) > MAX_ROOTS:
        pages *= 2
    return pages
