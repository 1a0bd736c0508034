"""What a guest's memory looks like: backing *regions*, and the *slots* that show them to the guest.

A region is a run of host memory (one memfd); bitmaps and the wire address regions, because a page has one home there. A
slot maps part of a region into the guest's physical address space, and is what KVM keeps a dirty log for. One region
may be seen through several slots (aliases). The map carries a generation number that changes with every slot that
comes or goes, so that a clear meant for an older layout can be refused (design rule 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from amig.errors import UsageError

PAGE_SIZE = 4096
WORD_PAGES = 64
"""Pages a word of a dirty bitmap stands for; KVM clears in multiples of it."""

MAX_REGION_BYTES = 16 << 40
MAX_REGIONS = 64
MAX_SLOTS = 512


Words = npt.NDArray[np.uint64]
"""A bitmap: bit ``i % 64`` of word ``i // 64`` is page ``i`` (KVM's own little-endian layout)."""

Pages = npt.NDArray[np.uint8]
"""Memory of one region as an array of shape ``(pages, 4096)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A run of backing memory, ``size`` bytes long, a multiple of the page size."""

    id: int
    size: int

    @property
    def pages(self) -> int:
        """Its length in pages."""
        return self.size // PAGE_SIZE

    @property
    def words(self) -> int:
        """Length of its bitmap in 64-bit words."""
        return -(-self.pages // WORD_PAGES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """``size`` bytes of region ``region`` from ``offset`` on, shown to the guest at ``guest_phys``."""

    index: int
    guest_phys: int
    size: int
    region: int
    offset: int

    @property
    def pages(self) -> int:
        """Its length in pages."""
        return self.size // PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryMap:
    """All regions and slots of a guest at one moment, numbered by ``generation``."""

    generation: int
    regions: tuple[Region, ...]
    slots: tuple[Slot, ...]

    @property
    def size(self) -> int:
        """Bytes of backing memory."""
        return sum(r.size for r in self.regions)

    def region(self, region_id: int) -> Region:
        """Return the region of that id; raises `UsageError` when there is none."""
        for region in self.regions:
            if region.id == region_id:
                return region
        raise UsageError(f"the guest has no memory region {region_id}")

    def check(self) -> None:
        """Raise `UsageError` unless every number is sane; for maps that came from outside."""
        if not 0 < len(self.regions) <= MAX_REGIONS or not 0 < len(self.slots) <= MAX_SLOTS:
            raise UsageError(f"a memory map of {len(self.regions)} regions and {len(self.slots)} slots")
        if self.generation < 0:
            raise UsageError("a memory map of a negative generation")
        by_id: dict[int, Region] = {}
        for region in self.regions:
            if region.id in by_id or not 0 <= region.id < 2**32:
                raise UsageError(f"memory region id {region.id} is out of range or stands twice")
            if not 0 < region.size <= MAX_REGION_BYTES or region.size % PAGE_SIZE:
                raise UsageError(f"memory region {region.id} has a size of {region.size} bytes")
            by_id[region.id] = region
        indexes: set[int] = set()
        spans: list[tuple[int, int]] = []
        for slot in self.slots:
            home = by_id.get(slot.region)
            aligned = not (slot.size % PAGE_SIZE or slot.offset % PAGE_SIZE or slot.guest_phys % PAGE_SIZE)
            if home is None or slot.index in indexes or slot.index < 0 or slot.size <= 0 or not aligned:
                raise UsageError(f"memory slot {slot.index} is malformed")
            if slot.offset < 0 or slot.offset + slot.size > home.size:
                raise UsageError(f"memory slot {slot.index} leaves its region")
            if slot.guest_phys < 0 or slot.guest_phys + slot.size > 1 << 52:
                raise UsageError(f"memory slot {slot.index} leaves the physical address space")
            indexes.add(slot.index)
            spans.append((slot.guest_phys, slot.guest_phys + slot.size))
        spans.sort()
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise UsageError("memory slots overlap in the guest's physical address space")


class GuestMemory(Protocol):
    """Guest memory mapped into this process."""

    @property
    def map(self) -> MemoryMap:
        """Regions and slots as they are now."""

    def pages(self, region: int) -> Pages:
        """Return the live memory of a region, shape ``(pages, 4096)``; no copy."""

    def data_ranges(self, region: int, first: int, count: int) -> list[tuple[int, int]]:
        """Return ``(first page, pages)`` of every run that is not a hole in the file behind the region.

        A hole is zero, and reading it through the mapping would allocate it. Source: lseek(2), SEEK_DATA.
        """

    def fds(self) -> Mapping[int, int]:
        """Return the memfd of every region, still owned by this object."""
