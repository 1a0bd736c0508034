"""An exact model of the kernel's dirty log: bits, write protection, GET and CLEAR as KVM does them.

A page's bit is set by the first write after it was write-protected; GET in automatic mode and CLEAR in manual mode
clear bits and protect those pages again. So "protected" is "bit clear", and one bitmap a slot is the whole state.
Source: KVM api.rst 4.8 and 4.117, virt/kvm/kvm_main.c (kvm_get_dirty_log_protect, kvm_clear_dirty_log_protect).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from amig import bitmap
from amig.dirty.log import LogAbilities
from amig.errors import KvmError
from amig.memory import WORD_PAGES, MemoryMap, Words

MODERN = LogAbilities(manual_clear=True, initially_set=True)


@dataclass(slots=True)
class _SlotLog:
    pages: int
    words: Words | None = None
    """None while logging is off."""


class SimKernelLog:
    """`amig.dirty.log.KernelLog` without a kernel. Thread-safe; each call is one atomic step."""

    def __init__(self, memory_map: MemoryMap, abilities: LogAbilities = MODERN) -> None:
        self.abilities = abilities
        self._lock = threading.RLock()
        self._slots = {slot.index: _SlotLog(slot.pages) for slot in memory_map.slots}
        self._manual = False

    # What KVM offers.

    def start(self, slot: int, *, manual: bool) -> None:
        """Switch logging on; with "initially set" in manual mode the log starts all ones, else all zeros."""
        with self._lock:
            log = self._slot(slot, "KVM_SET_USER_MEMORY_REGION")
            others = [other for index, other in self._slots.items() if index != slot and other.words is not None]
            if (manual and not self.abilities.manual_clear) or (others and manual != self._manual):
                _fail("KVM_ENABLE_CAP", errno.EINVAL, "manual dirty-log protection is one setting for the whole VM")
            self._manual = manual
            if log.words is None:
                full = manual and self.abilities.initially_set
                log.words = bitmap.ones(log.pages) if full else bitmap.zeros(log.pages)

    def stop(self, slot: int) -> None:
        """Switch logging off; what was known is gone."""
        with self._lock:
            self._slot(slot, "KVM_SET_USER_MEMORY_REGION").words = None

    def get(self, slot: int, out: Words) -> None:
        """Copy the bitmap to ``out``; unless manual, clear it and protect its pages."""
        with self._lock:
            words = self._logged(slot, "KVM_GET_DIRTY_LOG")
            if out.size < words.size:
                _fail("KVM_GET_DIRTY_LOG", errno.EFAULT, "the buffer is shorter than the slot's bitmap")
            out[: words.size] = words
            if not self._manual:
                words[:] = 0

    def clear(self, slot: int, first: int, count: int, words: Words) -> None:
        """Clear, and protect, the pages of ``first`` to ``first + count - 1`` whose bits are set in ``words``."""
        request = "KVM_CLEAR_DIRTY_LOG"
        with self._lock:
            mine = self._logged(slot, request)
            pages = self._slots[slot].pages
            if not self.abilities.manual_clear:
                _fail(request, errno.EINVAL, "this kernel has no manual clear")
            if first % WORD_PAGES or first > pages or count > pages - first or first < 0 or count < 0:
                _fail(request, errno.EINVAL, f"first page {first} or count {count} out of place")
            if count < pages - first and count % WORD_PAGES:
                _fail(request, errno.EINVAL, f"{count} pages are not a multiple of 64 and do not end the slot")
            size = bitmap.words_for(count)
            if words.size < size:
                _fail(request, errno.EFAULT, "the bitmap is shorter than the range")
            low = first // WORD_PAGES
            mine[low : low + size] &= ~words[:size]

    # What happens to a guest.

    @contextmanager
    def atomically(self) -> Iterator[None]:
        """Hold the log still: a write and its mark made in here can't be told apart by anyone."""
        with self._lock:
            yield

    def guest_write(self, slot: int, pages: npt.ArrayLike) -> int:
        """Mark pages of a slot as written; returns how many of them were protected (write faults)."""
        with self._lock:
            log = self._slot(slot, "guest write")
            index = np.asarray(pages, dtype=np.int64)
            if index.size and (index.min() < 0 or index.max() >= log.pages):
                raise IndexError(f"a page outside of slot {slot}")
            if log.words is None:
                return 0
            touched = np.unique(index >> 6)
            before = bitmap.count(log.words[touched])
            np.bitwise_or.at(log.words, index >> 6, np.left_shift(np.uint64(1), (index & 63).astype(np.uint64)))
            return bitmap.count(log.words[touched]) - before

    def peek(self, slot: int) -> Words | None:
        """Return a copy of a slot's bitmap, or None while its logging is off; for tests and proofs."""
        with self._lock:
            words = self._slot(slot, "peek").words
            return None if words is None else words.copy()

    def set_slots(self, memory_map: MemoryMap, *, replaced: tuple[int, ...] = ()) -> None:
        """Take over another memory map: new, resized and ``replaced`` slots start with logging off."""
        with self._lock:
            before, self._slots = self._slots, {}
            for slot in memory_map.slots:
                old = before.get(slot.index)
                keep = old is not None and old.pages == slot.pages and slot.index not in replaced
                self._slots[slot.index] = old if old is not None and keep else _SlotLog(slot.pages)

    def _slot(self, slot: int, request: str) -> _SlotLog:
        found = self._slots.get(slot)
        if found is None:
            _fail(request, errno.ENOENT, f"there is no slot {slot}")
        return found

    def _logged(self, slot: int, request: str) -> Words:
        words = self._slot(slot, request).words
        if words is None:
            _fail(request, errno.ENOENT, f"logging is off for slot {slot}")
        return words


def _fail(request: str, number: int, why: str) -> NoReturn:
    raise KvmError(f"{request} failed: {errno.errorcode[number]}: {why}", request=request, errno=number)
