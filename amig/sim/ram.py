"""The simulated guest's view of its memory: writes and dirty marks are one step, as behind a write-protected page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from amig.errors import UsageError
from amig.memory import PAGE_SIZE, MemoryMap, Pages
from amig.sim.content import PAGE_WORDS, U64
from amig.sim.kernel_log import SimKernelLog

Frames = npt.NDArray[np.int64]
"""Guest page frame numbers: guest-physical addresses divided by the page size."""


class HasPages(Protocol):
    """Memory as the simulator needs it; `amig.memory.GuestMemory` and more has this."""

    @property
    def map(self) -> MemoryMap:
        """Regions and slots."""

    def pages(self, region: int) -> Pages:
        """Live memory of a region."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """A slot and the memory behind it."""

    slot: int
    frame: int
    count: int
    words: U64
    """Shape ``(count, 512)``."""


class SimRam:
    """Guest memory by frame. Only what goes through `write`, `add` and `stores` is marked dirty."""

    def __init__(self, memory: HasPages, log: SimKernelLog) -> None:
        self._log = log
        self._spans = [
            _Span(
                slot=slot.index,
                frame=slot.guest_phys // PAGE_SIZE,
                count=slot.pages,
                words=memory.pages(slot.region)[slot.offset // PAGE_SIZE :][: slot.pages].view(np.uint64),
            )
            for slot in sorted(memory.map.slots, key=lambda slot: slot.guest_phys)
        ]

    def ranges(self, start: int) -> list[tuple[int, int]]:
        """Return (first frame, frames) of all memory from frame ``start`` up."""
        found = []
        for span in self._spans:
            first = max(span.frame, start)
            if first < span.frame + span.count:
                found.append((first, span.frame + span.count - first))
        return found

    def view(self, gpa: int, size: int) -> npt.NDArray[np.uint8]:
        """Return live memory that lies in one slot; writes go through `stores`. Raises `UsageError` outside."""
        for span in self._spans:
            inside = gpa - span.frame * PAGE_SIZE
            if inside >= 0 and inside + size <= span.count * PAGE_SIZE:
                return span.words.view(np.uint8).reshape(-1)[inside : inside + size]
        raise UsageError(f"the simulated guest needs {size} bytes of memory at {gpa:#x}")

    def read(self, frames: Frames) -> U64:
        """Return copies of pages, shape ``(n, 512)``."""
        pages = np.empty((frames.size, PAGE_WORDS), dtype=np.uint64)
        for span, which, inside in self._split(frames):
            pages[which] = span.words[inside]
        return pages

    def write(self, frames: Frames, pages: U64) -> None:
        """Replace pages; each frame stands once."""
        with self._log.atomically():
            for span, which, inside in self._split(frames):
                span.words[inside] = pages[which]
                self._log.guest_write(span.slot, inside)

    def add(self, frames: Frames, offsets: npt.NDArray[np.int64]) -> None:
        """Add one to one byte of each page; each frame stands once."""
        with self._log.atomically():
            for span, which, inside in self._split(frames):
                span.words.view(np.uint8)[inside, offsets[which]] += 1
                self._log.guest_write(span.slot, inside)

    @contextmanager
    def stores(self, gpa: int, size: int) -> Iterator[None]:
        """Write to a `view` inside of this block: its pages are marked in the same step."""
        with self._log.atomically():
            yield
            first, last = gpa // PAGE_SIZE, (gpa + size - 1) // PAGE_SIZE
            self.mark(np.arange(first, last + 1, dtype=np.int64))

    @contextmanager
    def atomically(self) -> Iterator[None]:
        """Make what is written and marked inside one step."""
        with self._log.atomically():
            yield

    def mark(self, frames: Frames) -> None:
        """Mark pages that were written inside of `atomically`."""
        for span, _, inside in self._split(frames):
            self._log.guest_write(span.slot, inside)

    def _split(self, frames: Frames) -> Iterator[tuple[_Span, slice | npt.NDArray[np.bool_], Frames]]:
        """Yield for each slot concerned: the slot, which of ``frames`` lie there, and their pages in it."""
        left = frames.size
        for span in self._spans:
            inside = frames - span.frame
            here = (inside >= 0) & (inside < span.count)
            found = int(np.count_nonzero(here))
            if found == frames.size and found:
                yield span, slice(None), inside
                return
            if found:
                yield span, here, inside[here]
                left -= found
        if left:
            raise UsageError("the simulated guest wrote where it has no memory")
