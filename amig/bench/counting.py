"""Which pages a migration sends again though nothing wrote them: counted from outside, on a guest that checks itself.

The checking guest counts each write of a page twice: in its table of generations before the first store to the page,
and in the page's second word with the last one. The device backend counts its own writes before and after, too. So the
migrator, which maps the memory, can look at all pages just before and just after each clear, and know of a page that it
takes again:

- no write was under way before the last clear, and none had begun when this take was over: a **needless** copy;
- no write ended between the look after the last clear and the look before this take: needless *or* written within the
  time that a clear itself takes (some 0.1 ms): an upper bound;
- as the first, but the device backend had written it between the last read of its log and the last clear: a **late**
  mark, which the migration learns of when the page has gone already;
- written since the last clear, but not since its last read can have been over: a copy due to the **window**, at most
  (the look that stands for the read comes some chunks later).

The clear that counts is the take; for the designs that clear when the log is read, or may do so, it is the sync.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from amig import bitmap
from amig.bench.mover import MeasuredGuest
from amig.errors import GuestError
from amig.guest import LogStarted
from amig.host import guest_abi as abi
from amig.memory import PAGE_SIZE, Words

READ_AFTER = 3
"""Takes after which a chunk has been read: no more of them are on their way between the clear and the connection."""
CLEAR_AT_SYNC = frozenset({"auto-clear", "ring"})

Counts = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
_NEVER = np.uint64(2**64 - 1)
_EXTERNAL = np.uint64(32)
"""Where the count of the backend's writes begins in a look; below it the guest's generation."""


class Look(NamedTuple):
    """How often each page had been written when it was looked at."""

    begun: Counts
    ended: Counts

    def at(self, pages: Numbers) -> Look:
        """Return it for some pages."""
        return Look(self.begun[pages], self.ended[pages])

    def settled(self) -> Counts:
        """Return the counts, with a value that nothing equals where a write was under way."""
        odd = (self.begun >> _EXTERNAL) & np.uint64(1)
        counts: Counts = np.where((self.begun == self.ended) & (odd == 0), self.begun, _NEVER)
        return counts


class Copies(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of the working set, as taken by a migration; what is no class of ``again`` was written since its read."""

    taken: int = 0
    again: int = 0
    needless: int = 0
    """For sure."""
    maybe: int = 0
    """Needless, or written during one of the two clears."""
    window: int = 0
    """Written between clear and read only; at most."""
    late: int = 0
    """Not written, but the mark of an earlier external write came late."""

    def plus(self, other: Copies) -> Copies:
        """Return the sums."""
        return Copies(
            taken=self.taken + other.taken,
            again=self.again + other.again,
            needless=self.needless + other.needless,
            maybe=self.maybe + other.maybe,
            window=self.window + other.window,
            late=self.late + other.late,
        )


class Classes:
    """Puts the pages that are taken into classes. Pure: looks come in as arrays."""

    def __init__(self, pages: int, *, clear_at_sync: bool = False) -> None:
        self._ever = np.zeros(pages, np.bool_)
        self._before: Counts = np.zeros(pages, np.uint64)
        self._after: Counts = np.zeros(pages, np.uint64)
        self._read: Counts = np.zeros(pages, np.uint64)
        self._unread: deque[Numbers] = deque()
        self._late = np.zeros(pages, np.bool_)
        self._clear_at_sync = clear_at_sync
        self._sync: tuple[Look, Look] | None = None
        self.copies = Copies()

    def synced(self, before: Look, after: Look) -> None:
        """The log was read; looks at all pages."""
        self._sync = (before, after)

    def looked(self, ended: Callable[[Numbers], Counts]) -> None:
        """A take begins: what was taken long enough ago has been read by now."""
        while len(self._unread) >= READ_AFTER:
            pages = self._unread.popleft()
            self._read[pages] = ended(pages)

    def took(self, pages: Numbers, before: Look, after: Look) -> None:
        """Pages were taken; looks at these pages."""
        again = self._ever[pages]
        old = pages[again]
        unwritten = self._before[old] == after.begun[again]
        late = unwritten & self._late[old]
        needless = unwritten & ~late
        maybe = (self._after[old] == before.ended[again]) & ~unwritten
        window = (self._read[old] == before.ended[again]) & ~unwritten & ~maybe
        self.copies = self.copies.plus(
            Copies(
                taken=len(pages),
                again=len(old),
                needless=int(needless.sum()),
                maybe=int(maybe.sum()),
                window=int(window.sum()),
                late=int(late.sum()),
            )
        )
        self._ever[pages] = True
        self._read[pages] = after.ended
        if self._sync is not None:
            self._late[pages] = (self._sync[0].begun[pages] ^ after.begun) >> _EXTERNAL != 0
        if self._clear_at_sync and self._sync is not None:
            before, after = self._sync[0].at(pages), self._sync[1].at(pages)
        self._before[pages], self._after[pages] = before.settled(), after.ended
        self._unread.append(pages)


class CountingGuest(MeasuredGuest):
    """A checking guest behind its control socket, whose pages are looked at around each clear."""

    classes: Classes | None = None
    on_log: Callable[[], None] = staticmethod(lambda: None)
    """Called when the log is on."""

    def count(self, counters: Path, strategy: str) -> None:
        """Prepare to count; the guest runs its workload. Raises `GuestError` for a guest that can't be counted.

        ``counters`` is the file that the device backend counts in.
        """
        low = self.low_memory()
        status = abi.parse_status(low)
        ranges = abi.ws_ranges(status)
        if len(ranges) != 1 or self.info.vcpus != 1 or int(status["workload"]) != abi.Work.CHECK:
            raise GuestError("to count copies takes a checking guest of one vCPU, its working set in one piece")
        gpa, pages = ranges[0]
        slot = next(s for s in self.info.memory.slots if s.guest_phys <= gpa < s.guest_phys + s.size)
        self.ws_page, self.ws_pages = gpa // PAGE_SIZE, pages
        self._region, self._first = slot.region, (gpa - slot.guest_phys + slot.offset) // PAGE_SIZE
        words = self.memory.pages(slot.region).view(np.uint64)
        self._ended = words[self._first : self._first + pages, 1]
        table = int(abi.parse_cpus(low, 1)[0]["gen_gpa"])
        self._begun = low[table : table + 4 * pages].view(np.uint32)
        with counters.open("r+b") as file:
            self._external: Counts = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint64)
        self.classes = Classes(pages, clear_at_sync=strategy in CLEAR_AT_SYNC)

    @property
    def ws_place(self) -> tuple[int, int]:
        """Region and first page of the working set there."""
        return self._region, self._first

    def _ended_at(self, pages: slice | Numbers) -> Counts:
        found: Counts = self._ended[pages] + (self._external[pages] << _EXTERNAL)
        return found

    def _look(self, pages: slice) -> Look:
        external = self._external[pages] << _EXTERNAL
        begun: Counts = self._begun[pages].astype(np.uint64) + external  # first: see `Look.settled`
        return Look(begun, self._ended[pages] + external)

    async def log_start(self, strategy: str | None, *, unsafe: bool = False, apart: bool = False) -> LogStarted:
        """See `SocketGuest.log_start`."""
        started = await super().log_start(strategy, unsafe=unsafe, apart=apart)
        self.on_log()
        return started

    async def sync(self) -> Mapping[int, Words]:
        """See `SocketGuest.sync`."""
        if self.classes is None:
            return await super().sync()
        before = self._look(slice(None))
        found = await super().sync()
        self.classes.synced(before, self._look(slice(None)))
        return found

    async def take_and_clear(self, region: int, first: int, count: int) -> Words:
        """See `SocketGuest.take_and_clear`."""
        classes = self.classes
        low = first if classes is None else max(first, self._first)
        high = first if classes is None else min(first + count, self._first + self.ws_pages)
        if classes is None or region != self._region or low >= high:
            return await super().take_and_clear(region, first, count)
        classes.looked(self._ended_at)
        part = slice(low - self._first, high - self._first)
        before = self._look(part)
        words = await super().take_and_clear(region, first, count)
        after = self._look(part)
        index = bitmap.to_pages(words, first)
        index = index[(index >= low) & (index < high)]
        classes.took(index - self._first, before.at(index - low), after.at(index - low))
        return words
