"""A vCPU's dirty ring: KVM writes what was dirtied, we mark it harvested, KVM_RESET_DIRTY_RINGS protects again.

See api.rst 8.29. The protocol asks for a load-acquire of an entry's flags before its slot and offset are read, and for
a store-release when it is marked harvested. x86-64 (all that `amig.kvm` runs on) keeps the order of loads, of stores,
and of a load before a later store, so plain accesses are both; numpy reads the flags in one call and the entries in a
later one, and an aligned 32-bit flag is stored whole.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from .abi_numbers import DIRTY_GFN_DIRTY, DIRTY_GFN_RESET

ENTRY = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])
"""``kvm_dirty_gfn``: slot (address space in the upper half) and page number within it."""


class DirtyRing:
    """The ring of one vCPU, ``entries`` long. One thread at a time may read it; the vCPU may run meanwhile.

    An entry is first *peeked*, which leaves it as it is: its page stays writable. When it is *released*, the next
    KVM_RESET_DIRTY_RINGS protects the page again. The kernel resets entries in their order and stops at the first one
    that was not released, so only the oldest can be released.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._ring: npt.NDArray[np.void] = np.frombuffer(memory, dtype=ENTRY)
        self._peeked = 0  # both count from the ring's making on, round the ring; _released <= _peeked
        self._released = 0

    @property
    def entries(self) -> int:
        """How many entries the ring has."""
        return len(self._ring)

    @property
    def held(self) -> int:
        """Entries that were peeked and not released."""
        return self._peeked - self._released

    def peek(self) -> npt.NDArray[np.void]:
        """Copy the dirty entries that were not peeked before, oldest first: an array of ``ENTRY``."""
        room = self.entries - self.held  # what lies beyond was peeked one turn ago and is still marked dirty
        start = self._peeked % self.entries
        parts = [self._dirty(start, min(start + room, self.entries))]
        if start + len(parts[0]) == self.entries:
            parts.append(self._dirty(0, start + room - self.entries))
        taken = np.concatenate(parts)
        self._peeked += len(taken)
        return taken

    def _dirty(self, start: int, end: int) -> npt.NDArray[np.void]:
        flags = self._ring["flags"][start:end]
        ended = np.flatnonzero((flags & (DIRTY_GFN_DIRTY | DIRTY_GFN_RESET)) != DIRTY_GFN_DIRTY)
        count = int(ended[0]) if len(ended) else len(flags)
        return self._ring[start : start + count].copy()

    def release(self, count: int) -> None:
        """Mark the ``count`` oldest peeked entries harvested; KVM_RESET_DIRTY_RINGS then protects their pages again."""
        if not 0 <= count <= self.held:
            raise ValueError(f"{count} entries of a dirty ring can't be released: {self.held} were peeked")
        start = self._released % self.entries
        flags = self._ring["flags"]
        flags[start : start + count] = DIRTY_GFN_RESET
        flags[: max(0, start + count - self.entries)] = DIRTY_GFN_RESET
        self._released += count

    def harvest(self) -> npt.NDArray[np.void]:
        """Peek and release everything: an array of ``ENTRY``, oldest first.

        Their pages may be read only after KVM_RESET_DIRTY_RINGS (`Vm.reset_dirty_rings`).
        """
        taken = self.peek()
        self.release(self.held)
        return taken

    def close(self) -> None:
        """Unmap the ring."""
        self._ring = np.empty(0, dtype=ENTRY)
        self._memory.close()
