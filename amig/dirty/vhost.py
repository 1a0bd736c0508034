"""A dirty log that device backends in other processes share with the host, as vhost-user has it.

One bit for each 4 KiB of guest-physical address from 0 on, bit i % 8 of byte i / 8, in a memfd. A backend writes guest
memory, and *then* sets the bit, atomically (others set bits of the same byte). Source: vhost-user.rst, "Migration".

The hub harvests it with every sync. A bit that is set too late for one is found by the next, so the page is sent again;
the last sync of a migration comes when the backends have stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading

import numpy as np

from amig.dirty import atomic
from amig.errors import HostError
from amig.memory import PAGE_SIZE, WORD_PAGES, MemoryMap, Words

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class VhostLog:
    """The host's end of one such log; implements `amig.dirty.log.ExternalLog`. ``close`` it."""

    def __init__(self, memory_map: MemoryMap) -> None:
        """Make an empty log for all of a guest's slots.

        Raises `HostError` where this process can't exchange words atomically, or there is no memory.
        """
        atomic.require()
        end = max(slot.guest_phys + slot.size for slot in memory_map.slots) // PAGE_SIZE
        self.size = -(-end // (PAGE_SIZE * 8)) * PAGE_SIZE
        """Bytes."""
        try:
            self._fd = os.memfd_create("amig-vhost-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise HostError(f"can't make a log to be shared: {error.strerror}") from error
        try:
            os.ftruncate(self._fd, self.size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self._fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            os.close(self._fd)
            raise HostError(f"can't make a log to be shared: {error.strerror}") from error
        self._words: Words = np.frombuffer(self._map, dtype=np.uint64)
        self._found: Words = np.zeros(self._words.size, dtype=np.uint64)
        self._lock = threading.Lock()

    @property
    def pages(self) -> int:
        """How many pages from address 0 on it has bits for."""
        return self._words.size * WORD_PAGES

    @property
    def fd(self) -> int:
        """Its descriptor, open for writing, to be passed on; still owned by this object."""
        return self._fd

    def harvest(self) -> Words | None:
        """See `amig.dirty.log.ExternalLog.harvest`."""
        with self._lock:
            return self._found if atomic.take(self._words, self._found) else None

    def close(self) -> None:
        """Give it back; idempotent. Nothing may harvest it any more."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                self._words = np.empty(0, dtype=np.uint64)
                self._found = np.empty(0, dtype=np.uint64)
                with contextlib.suppress(BufferError):  # a view is held somewhere: the last one to go unmaps
                    self._map.close()
