"""How fast a guest dirties its memory, how large its working set is, and where it is hot.

The meter is one more user of the dirty log: it shares the log with a migration that runs and never takes anything away
from it (it asks for no strategy, so it clears only what all users were told of). It counts *pages that were written*
in each sample, not writes: a page written twice in a sample counts once, as it does for a migration's round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from amig import bitmap
from amig.errors import UsageError
from amig.guest import GuestInfo, LogStarted
from amig.memory import PAGE_SIZE, WORD_PAGES, MemoryMap, Words

MAX_SAMPLES = 3600
MAX_WINDOW = 64
"""Samples whose bitmaps are kept, to estimate the working set over as many."""
TAKE_PAGES = 1 << 16
"""Pages taken at a time: the kernel holds a lock meanwhile that the guest's write faults need."""


class MeteredGuest(Protocol):
    """What the meter asks of a guest; `amig.control.client.SocketGuest` and `amig.host.local.LocalGuest` have it."""

    @property
    def info(self) -> GuestInfo:
        """As it was when this object was made."""

    async def log_start(self, strategy: str | None, *, apart: bool = False) -> LogStarted:
        """Become a user of the dirty log."""

    async def sync(self) -> Mapping[int, Words]:
        """Return the user's pending bits of every region."""

    async def take_apart(self, region: int, first: int, count: int) -> tuple[Words, int]:
        """Take a range; and how many of the pages are only possibly dirty."""

    async def log_stop(self) -> None:
        """Leave the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A range of one region, in pages; both ends on multiples of 64 unless the region ends there."""

    region: int
    first: int
    count: int

    @property
    def words(self) -> slice:
        """Its place in a bitmap of the region."""
        return slice(self.first // WORD_PAGES, bitmap.words_for(self.first + self.count))


def spans_of(memory: MemoryMap, start: int | None = None, size: int | None = None) -> tuple[Span, ...]:
    """Return what to measure: all memory, or ``size`` bytes from guest-physical ``start`` on, rounded to 64 pages.

    Raises `UsageError` when no memory is there.
    """
    if start is None or size is None:
        return tuple(Span(region=region.id, first=0, count=region.pages) for region in memory.regions)
    found = []
    for slot in memory.slots:
        low, high = max(start, slot.guest_phys), min(start + size, slot.guest_phys + slot.size)
        if low < high:
            pages = memory.region(slot.region).pages
            shift = slot.offset - slot.guest_phys
            first = (low + shift) // PAGE_SIZE // WORD_PAGES * WORD_PAGES
            end = -(-(high + shift) // PAGE_SIZE // WORD_PAGES) * WORD_PAGES
            found.append(Span(region=slot.region, first=first, count=min(end, pages) - first))
    if not found:
        raise UsageError(f"the guest has no memory at {start:#x} to {start + size:#x}")
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was written between two looks."""

    seconds: float
    pages: int
    """Pages known to have been written."""
    possible: int
    """Pages that another user of the log cleared before anyone knew whether they were set; not in ``pages``."""

    @property
    def pages_per_s(self) -> float:
        """The rate, without what is only possible."""
        return self.pages / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """An estimate of the working set: different pages written within so many seconds."""

    seconds: float
    pages: int


class DirtyMeter:
    """Measures one guest. ``async with`` starts and ends its use of the log; then iterate over `samples`."""

    def __init__(
        self,
        guest: MeteredGuest,
        spans: tuple[Span, ...] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        """Measure ``spans``, or all memory. ``clock`` and ``sleep`` (a coroutine function) are for tests."""
        self.spans = spans if spans is not None else spans_of(guest.info.memory)
        self.samples_taken: list[Sample] = []
        self._guest = guest
        self._clock = clock
        self._sleep = sleep or asyncio.sleep
        self._kept: list[tuple[float, list[Words]]] = []
        self._heat = [np.zeros(words_of(span), dtype=np.int64) for span in self.spans]
        self._since = 0.0

    @property
    def pages(self) -> int:
        """Pages that are looked at."""
        return sum(span.count for span in self.spans)

    async def __aenter__(self) -> DirtyMeter:
        """Become a user of the log. Raises `ControlError`."""
        await self._guest.log_start(None, apart=True)
        try:
            await self._look()  # all pages are pending in the beginning: that says nothing
        except BaseException:
            await self._guest.log_stop()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._guest.log_stop()

    async def samples(self, seconds: float, count: int) -> AsyncIterator[Sample]:
        """Yield ``count`` samples of about ``seconds`` each. Raises `UsageError`, `ControlError`."""
        if not 0.01 <= seconds <= 3600 or not 1 <= count <= MAX_SAMPLES:
            raise UsageError(f"samples last 0.01 s to an hour, and there are 1 to {MAX_SAMPLES} of them")
        for _ in range(count):
            await self._sleep(seconds)  # type: ignore[misc]
            yield await self._measure()

    async def _measure(self) -> Sample:
        begun = self._since
        taken, possible = await self._look()
        total = sum(map(bitmap.count, taken))
        sample = Sample(seconds=max(self._since - begun, 1e-9), pages=total - possible, possible=possible)
        self.samples_taken.append(sample)
        self._kept.append((sample.seconds, taken))
        del self._kept[:-MAX_WINDOW]
        for heat, words in zip(self._heat, taken, strict=True):
            heat += bitmap.popcount(words)
        return sample

    async def _look(self) -> tuple[list[Words], int]:
        pending = await self._guest.sync()
        self._since = self._clock()
        # Copied before the takes: the bits that both report are those that this sync brought.
        found = [pending[span.region][span.words].copy() for span in self.spans]
        possible = 0
        for span, words in zip(self.spans, found, strict=True):
            for first in range(span.first, span.first + span.count, TAKE_PAGES):
                count = min(TAKE_PAGES, span.first + span.count - first)
                part = (first - span.first) // WORD_PAGES
                if words[part : part + bitmap.words_for(count)].any():
                    taken, unsure = await self._guest.take_apart(span.region, first, count)
                    words[part : part + len(taken)] = taken
                    possible += unsure
        return found, possible

    def working_set(self) -> tuple[Window, ...]:
        """Return estimates over the last 1, 2, 4, ... samples: different pages written in that time."""
        windows = []
        union: list[Words] = [np.zeros(words_of(span), dtype=np.uint64) for span in self.spans]
        seconds = 0.0
        for number, (length, taken) in enumerate(reversed(self._kept), start=1):
            seconds += length
            for whole, words in zip(union, taken, strict=True):
                whole |= words
            if number & (number - 1) == 0 or number == len(self._kept):
                windows.append(Window(seconds=seconds, pages=sum(map(bitmap.count, union))))
        return tuple(windows)

    def heat(self, cells: int) -> npt.NDArray[np.float64]:
        """Return how hot each of at most ``cells`` equal parts of memory is, in order: 1 means all of it each time."""
        by_word = np.concatenate(self._heat)
        cells = max(1, min(cells, by_word.size))
        edges = np.arange(cells) * by_word.size // cells
        ends = np.append(edges[1:], by_word.size)
        most = (ends - edges) * WORD_PAGES * max(1, len(self.samples_taken))
        return np.add.reduceat(by_word, edges) / most


def words_of(span: Span) -> int:
    """Return how many words its bitmap has."""
    return bitmap.words_for(span.count)
