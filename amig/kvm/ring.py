"""A vCPU's dirty ring: KVM writes what was dirtied, we mark it harvested, KVM_RESET_DIRTY_RINGS protects again.

See api.rst 8.29. The kernel stores an entry's slot and offset before it sets the dirty flag, and x86 keeps the order
of stores and of loads, so that plain numpy accesses are the load-acquire and store-release that the protocol asks for.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from .abi_numbers import DIRTY_GFN_DIRTY, DIRTY_GFN_RESET

ENTRY = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])
"""``kvm_dirty_gfn``: slot (address space in the upper half) and page number within it."""


class DirtyRing:
    """The ring of one vCPU, ``entries`` long. One thread at a time may harvest it; the vCPU may run meanwhile."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._ring: npt.NDArray[np.void] = np.frombuffer(memory, dtype=ENTRY)
        self._next = 0

    @property
    def entries(self) -> int:
        """How many entries the ring has."""
        return len(self._ring)

    def harvest(self) -> npt.NDArray[np.void]:
        """Take the dirty entries, oldest first, at most one turn of the ring: an array of ``ENTRY``.

        They are marked harvested; their pages may be read only after KVM_RESET_DIRTY_RINGS (`Vm.reset_dirty_rings`).
        """
        parts = [self._harvest_from(self._next, self.entries)]
        if self._next + len(parts[0]) == self.entries:
            parts.append(self._harvest_from(0, self._next))
        taken = np.concatenate(parts)
        self._next = (self._next + len(taken)) % self.entries
        return taken

    def _harvest_from(self, start: int, end: int) -> npt.NDArray[np.void]:
        flags = self._ring["flags"][start:end]
        ended = np.flatnonzero((flags & (DIRTY_GFN_DIRTY | DIRTY_GFN_RESET)) != DIRTY_GFN_DIRTY)
        count = int(ended[0]) if len(ended) else len(flags)
        taken = self._ring[start : start + count].copy()
        flags[:count] = DIRTY_GFN_RESET
        return taken

    def close(self) -> None:
        """Unmap the ring."""
        self._ring = np.empty(0, dtype=ENTRY)
        self._memory.close()
