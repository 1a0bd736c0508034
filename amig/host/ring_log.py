"""The dirty rings of a VM as `amig.dirty.log.KernelLog`.

GET copies the entries that vCPUs have added since the last one, and leaves the pages writable. CLEAR resets the entries
that name the pages asked for, and with them all older ones, because the kernel resets a ring in order. So a page is
protected again when it is about to be read (design rules 1 and 7), unless a ring runs full before: then its vCPU's
thread resets everything, as early as `auto-clear` would.

Nothing is lost by that, because a page's bit leaves this object through `get` and no other way: whatever was reset
before a GET has returned it is kept for the next one. A page that is named by an entry which no GET has returned is
never reset by `clear`, unless an older entry stands behind it, and then it is kept as well.

The one harvest that must be complete is the last one, and it comes while all vCPUs are paused: each has left the guest
then, which is what makes processors that log by themselves (Intel's PML) hand over what they have. One that is
incomplete because a vCPU runs is only late.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from amig import bitmap
from amig.dirty.log import LogAbilities
from amig.kvm.ring import DirtyRing
from amig.kvm.vcpu import Vcpu
from amig.kvm.vm import Vm
from amig.memory import WORD_PAGES, Words

Places = tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]
"""Slots and pages within them, of entries in their order."""
_NOTHING: Places = (np.empty(0, np.uint32), np.empty(0, np.uint64))


class RingLog:
    """See above. `get`, `clear`, `start` and `stop` are serialised by the hub; `full` comes from vCPU threads."""

    def __init__(self, vm: Vm, rings: Sequence[DirtyRing]) -> None:
        self.abilities = LogAbilities(manual_clear=True, initially_set=False, ring=True)
        self.full_exits = 0
        """How often a ring was full."""
        self._vm = vm
        self._rings = tuple(rings)
        self._lock = threading.Lock()  # nothing but the rings is waited for under it: a vCPU's thread may need it
        self._held: list[Places] = [_NOTHING for _ in rings]
        self._news: dict[int, Words] = {}
        """By slot: pages named by entries that were peeked, and not returned by `get` yet."""

    @property
    def logging(self) -> frozenset[int]:
        """The slots whose log is on."""
        return frozenset(self._news)

    def start(self, slot: int, *, manual: bool) -> None:
        """Switch logging on; all pages of the slot are write-protected by it."""
        del manual  # rings know one way
        with self._lock:
            here = self._vm.regions
            self._news = {old: news for old, news in self._news.items() if old in here}  # the others were deleted
            if not self._news:
                self._drain()  # what was left when logging was last switched off; all pages are pending now
            self._news[slot] = bitmap.zeros(self._vm.region(slot).pages)
        try:
            self._vm.set_dirty_logging(slot, True)
        except BaseException:
            del self._news[slot]
            raise

    def stop(self, slot: int) -> None:
        """Switch logging off; nothing to do when it is off, or the VM closed."""
        if slot not in self._news:
            return
        try:
            if not self._vm.closed:
                self._vm.set_dirty_logging(slot, False)
        finally:
            with self._lock:
                del self._news[slot]
                if not self._news and not self._vm.closed:
                    self._drain()

    def get(self, slot: int, out: Words) -> None:
        """Fill ``out`` with the pages of the slot that entries name which no `get` has returned; clears nothing."""
        with self._lock:
            for number in range(len(self._rings)):
                self._peek(number)
            news = self._news[slot]
            out[: news.size] = news
            news[:] = 0

    def clear(self, slot: int, first: int, count: int, words: Words) -> None:
        """Protect the pages again whose bits are set, and all that were written before them in the same ring."""
        with self._lock:
            released = 0
            for number in range(len(self._rings)):
                released += self._release(number, self._oldest_part(number, slot, first, count, words))
            if released:
                self._vm.reset_dirty_rings()

    def full(self, vcpu: Vcpu | None = None) -> None:
        """Make room: reset all rings. Called by the thread of a vCPU whose KVM_RUN ended because its ring is full.

        Raises `KvmError`. Never waits for the hub, so that a vCPU can't be held up by whoever uses that.
        """
        del vcpu
        with self._lock:
            self.full_exits += 1
            self._drain()

    # Under the lock.

    def _drain(self) -> None:
        for number, ring in enumerate(self._rings):
            self._peek(number)
            self._release(number, ring.held)
        self._vm.reset_dirty_rings()

    def _peek(self, number: int) -> None:
        entries = self._rings[number].peek()
        if not len(entries):
            return
        slots, pages = entries["slot"].copy(), entries["offset"].copy()
        before = self._held[number]
        self._held[number] = (np.concatenate((before[0], slots)), np.concatenate((before[1], pages)))
        for slot, news in self._news.items():
            mine = pages if (slots == slot).all() else pages[slots == slot]
            mine = mine[mine < news.size * WORD_PAGES].astype(np.int64)
            bits = np.left_shift(np.uint64(1), (mine & 63).astype(np.uint64))
            np.bitwise_or.at(news, mine >> 6, bits)

    def _release(self, number: int, count: int) -> int:
        if count:
            self._rings[number].release(count)
            slots, pages = self._held[number]
            self._held[number] = (slots[count:], pages[count:])
        return count

    def _oldest_part(self, number: int, slot: int, first: int, count: int, words: Words) -> int:
        """Return how many entries from the oldest on have to go for all that name a page of ``words`` to be gone."""
        slots, pages = self._held[number]
        if not len(slots):
            return 0
        here = np.flatnonzero((slots == slot) & (pages >= first) & (pages < first + count))
        inside = pages[here].astype(np.int64) - first
        wanted = here[(words[inside >> 6] >> (inside & 63).astype(np.uint64)) & np.uint64(1) != 0]
        return int(wanted[-1]) + 1 if len(wanted) else 0
