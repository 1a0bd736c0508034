"""`MemoryStock`: where the memory of a guest that arrives comes from, some of it prepared before it comes.

Backing memory page by page as its data arrives takes time that a migration has not: zeroing alone is as slow as a fast
link. What is backed ahead is only written to. The price is that such a guest has no holes any more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable

from amig.errors import HostError, Refused, UsageError
from amig.host import layout
from amig.host.mapping import HUGE_PAGE
from amig.host.memory import MemfdMemory
from amig.host.room import Room, room
from amig.memory import PAGE_SIZE, MemoryMap
from amig.units import format_size

_STEP = (64 << 20) // PAGE_SIZE
"""Pages backed before looking whether somebody waits for the memory: some tens of milliseconds."""


class MemoryStock:
    """Makes guest memory, from what was prepared where the guest fits into it.

    `prepare` and `make` block and may be called from different threads at the same time: a guest that comes while its
    memory is still being backed takes it as it is.
    """

    def __init__(
        self,
        *,
        ahead: int = 0,
        limit: int = 0,
        hugepages: bool = False,
        tell: Callable[[str], None] = lambda _: None,
        look: Callable[[], Room] | None = None,
    ) -> None:
        """``ahead`` bytes are prepared, guests of more than ``limit`` bytes refused (0: none are).

        ``tell`` hears, from any thread, in one sentence what happens to a guest that does not fit. ``look`` replaces
        `room` in tests. Raises `UsageError` for sizes that no guest has.
        """
        if ahead:
            layout.memory_map(ahead)  # refuses what is no size of memory
        if hugepages and ahead % HUGE_PAGE:
            raise UsageError(f"with huge pages guest memory must be a multiple of 2 MiB, not {ahead} bytes")
        if limit and ahead > limit:
            raise UsageError(f"{format_size(ahead)} are to be prepared and guests of up to {format_size(limit)} taken")
        self._ahead = ahead
        self._limit = limit
        self._hugepages = hugepages
        self._tell = tell
        self._look = look or (lambda: room(hugepages=hugepages))
        self._lock = threading.Lock()
        self._waited_for = False
        self._ready: MemfdMemory | None = None
        self._backed = 0

    @property
    def ahead(self) -> int:
        """Bytes that are to be prepared."""
        return self._ahead

    @property
    def prepared(self) -> int:
        """Bytes that are backed and wait for a guest."""
        return self._backed * PAGE_SIZE if self._ready is not None else 0

    def prepare(self, stop: threading.Event) -> None:
        """Have ``ahead`` bytes backed, or go on with that; returns early when ``stop`` is set, or for `make`.

        Raises `HostError` when the machine has not that much memory, with none of it kept.
        """
        with self._lock:
            if self._ready is None:
                self._check_room()
                self._ready, self._backed = MemfdMemory.create(self._ahead, hugepages=self._hugepages), 0
        try:
            while not stop.is_set() and not self._waited_for and self._back():
                pass
        except BaseException:
            self.close()
            raise

    def _check_room(self) -> None:
        found = self._look()
        if self._ahead > found.bytes:
            raise HostError(
                f"can't prepare {format_size(self._ahead)} of guest memory: {format_size(found.bytes)} are left "
                f"({found.limit}); prepare less, or nothing (without it memory is made as it arrives)"
            )

    def _back(self) -> bool:
        """Back a step; returns whether there is more to do."""
        with self._lock:
            memory = self._ready
            if memory is None:
                return False
            count = min(_STEP, self._ahead // PAGE_SIZE - self._backed)
            memory.populate(0, self._backed, count)
            self._backed += count
            memory.backed = self._backed * PAGE_SIZE == self._ahead
            return not memory.backed

    def admit(self, name: str, memory: MemoryMap, used: int) -> None:
        """Raise `Refused` for a guest that there is no room for.

        ``used`` are the bytes that hold something at the source; it may come to use more of its memory later.
        """
        if self._limit and memory.size > self._limit:
            raise Refused(
                f"guest {name} has {format_size(memory.size)} of memory, and this host takes guests of up to "
                f"{format_size(self._limit)} (--max-memory)"
            )
        if self._fits(memory) and self._backed * PAGE_SIZE >= used:
            return
        needed = memory.size if self._hugepages else min(used, memory.size)
        found = self._look()
        left = found.bytes + self.prepared
        if needed > left:
            raise Refused(
                f"guest {name} needs {format_size(needed)} of memory now, and {format_size(left)} are left here "
                f"({found.limit}): free some, or move it to a larger host"
            )

    def make(self, memory_map: MemoryMap) -> MemfdMemory:
        """Return memory of this layout, the caller's; raises `UsageError` or `HostError`."""
        fits = self._fits(memory_map)
        ready = self._taken()
        if ready is not None and fits:
            ready.recast(memory_map)
            return ready
        if ready is not None:
            _give_back(ready)
            self._tell(
                f"a guest of {format_size(memory_map.size)} does not fit the {format_size(self._ahead)} that were "
                "prepared: they are given back, and its memory is made as it arrives"
            )
        return MemfdMemory(memory_map, hugepages=self._hugepages)

    def _fits(self, memory_map: MemoryMap) -> bool:
        if self._ready is None or len(memory_map.regions) != 1:
            return False
        size = memory_map.regions[0].size
        return size <= self._ahead and not (self._hugepages and size % HUGE_PAGE)

    def close(self) -> None:
        """Give back what is prepared; idempotent."""
        ready = self._taken()
        if ready is not None:
            _give_back(ready)

    def _taken(self) -> MemfdMemory | None:
        """Return what is prepared, no longer ours."""
        self._waited_for = True  # the lock alone would not do: who backs step after step takes it again at once
        with self._lock:
            self._waited_for = False
            ready, self._ready, self._backed = self._ready, None, 0
        return ready


def _give_back(memory: MemfdMemory) -> None:
    memory.empty()
    memory.close()


def in_use(fds: Iterable[int]) -> int:
    """Return the bytes of memory behind guest memory's descriptors: what is no hole."""
    return sum(os.fstat(fd).st_blocks for fd in fds) * 512
