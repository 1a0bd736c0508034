"""Design rules 2 to 5 on real KVM: slots that come, go and change while the log is on, aliases, unaligned ranges.

A guest of one instruction writes pages that a test chooses; the hub, the strategies and the kernel's log are the real
ones. Memory is one region; slots show parts of it.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from amig import bitmap
from amig.dirty.hub import DirtyLogHub, HubUser
from amig.errors import ControlError, KvmError
from amig.host.kvm_log import KvmLog
from amig.host.ring_log import RingLog
from amig.kvm.abi_numbers import ExitReason
from amig.kvm.cpuid import CpuModel
from amig.kvm.system import Kvm
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot
from tests.tinyguest import STORE

pytestmark = pytest.mark.kvm

PAGES = 200
"""Of the region; the guest's code lies in another slot, which is not logged."""
CODE = 0xF0000
LOGS = ["ones first", "zeros first", "ring"]


def slot(index: int, guest_page: int, pages: int, offset: int) -> Slot:
    return Slot(
        index=index,
        guest_phys=guest_page * PAGE_SIZE,
        size=pages * PAGE_SIZE,
        region=0,
        offset=offset * PAGE_SIZE,
    )


class Board:
    """A VM in real mode (addresses below 1 MiB) whose slots a test changes."""

    def __init__(self, log: str, *slots: Slot) -> None:
        self.kvm = Kvm.open()
        self.vm = self.kvm.create_vm()
        self.ring = log == "ring"
        if self.ring:
            self.vm.enable_dirty_ring(4096)
        self.vm.set_tss_addr(0xFFFB_D000)
        self.vm.set_identity_map_addr(0xFFFB_C000)
        self.memory = mmap.mmap(-1, (PAGES + 1) * PAGE_SIZE)
        self._pin = ctypes.c_char.from_buffer(self.memory)
        self.address = ctypes.addressof(self._pin)
        self.memory[PAGES * PAGE_SIZE : PAGES * PAGE_SIZE + len(STORE)] = STORE
        self.vm.set_memory_region(30, CODE, PAGE_SIZE, self.address + PAGES * PAGE_SIZE)
        self.generation = 0
        self.slots: tuple[Slot, ...] = ()
        self._register(slots)
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid2(CpuModel.host(self.kvm.supported_cpuid()).for_vcpu(0, 1))
        self.log = (
            RingLog(self.vm, [self.vcpu.dirty_ring])
            if self.ring
            else KvmLog(self.vm, initially_set=log == "ones first")
        )
        self.hub = DirtyLogHub(self.log, self.map)

    @property
    def map(self) -> MemoryMap:
        return MemoryMap(generation=self.generation, regions=(Region(id=0, size=PAGES * PAGE_SIZE),), slots=self.slots)

    def _register(self, slots: tuple[Slot, ...]) -> None:
        for old in self.slots:
            if old not in slots:
                self.vm.delete_memory_region(old.index)
        for new in slots:
            if new not in self.slots:
                self.vm.set_memory_region(new.index, new.guest_phys, new.size, self.address + new.offset)
        self.slots = slots
        self.generation += 1

    def change(self, *slots: Slot) -> None:
        """As a VMM does it: the log is held still while slots and map change."""
        with self.hub.changing():
            self._register(slots)
            self.hub.slots_changed(self.map)

    def write(self, guest_page: int, value: int = 1) -> None:
        sregs = self.vcpu.get_sregs()
        sregs.cs.base, sregs.cs.selector = CODE, CODE >> 4
        sregs.ds.base, sregs.ds.selector = guest_page << 12, guest_page << 8
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.get_regs()
        regs.rip, regs.rflags, regs.rax, regs.rbx = 0, 2, value, 0
        self.vcpu.set_regs(regs)
        while (reason := self.vcpu.run()) is ExitReason.DIRTY_RING_FULL:
            self.log.full()
        assert reason is ExitReason.HLT

    def sync(self, user: HubUser) -> list[int]:
        return bitmap.to_pages(user.sync()[0]).tolist()

    def take(self, user: HubUser, first: int = 0, count: int = PAGES) -> list[int]:
        return bitmap.to_pages(user.take_and_clear(0, first, count, self.generation), first).tolist()

    def close(self) -> None:
        self.vm.close()
        self.kvm.close()
        del self._pin
        self.memory.close()


@pytest.fixture(params=LOGS)
def board(request: pytest.FixtureRequest) -> Iterator[Callable[..., Board]]:
    made: list[Board] = []

    def make(*slots: Slot) -> Board:
        made.append(Board(request.param, *slots))
        return made[-1]

    yield make
    for one in made:
        one.close()


def clean(board: Board, user: HubUser) -> None:
    """All pages are taken, and so protected."""
    board.sync(user)
    board.take(user)
    assert board.sync(user) == []


@pytest.mark.parametrize(("first", "count"), [(0, 200), (1, 1), (63, 2), (60, 100), (65, 63), (199, 1), (130, 70)])
def test_rule_3_an_unaligned_take_clears_nothing_outside_of_it(board, first: int, count: int) -> None:
    kvm = board(slot(0, 0, PAGES, 0))
    user = kvm.hub.open("one")
    clean(kvm, user)
    for page in range(0, PAGES, 3):
        kvm.write(page)
    written = list(range(0, PAGES, 3))
    assert kvm.sync(user) == written
    inside = [page for page in written if first <= page < first + count]
    assert kvm.take(user, first, count) == inside
    for page in range(0, PAGES, 3):
        kvm.write(page, 2)
    seen = kvm.sync(user)
    assert seen == written, "what was cleared is dirty again, what was not still is"
    assert kvm.take(user) == written


@pytest.mark.parametrize("offset", [1, 37, 63, 64])
def test_rule_3_a_slot_that_starts_anywhere_in_its_region(board, offset: int) -> None:
    kvm = board(slot(0, 8, PAGES - offset, offset))
    user = kvm.hub.open("one")
    clean(kvm, user) if offset == 0 else (kvm.sync(user), kvm.take(user))
    last = PAGES - 1
    for page in (offset, offset + 63, offset + 64, last):
        kvm.write(page - offset + 8)
    assert kvm.sync(user) == sorted({offset, offset + 63, offset + 64, last})
    assert kvm.take(user, offset + 63, 2) == [offset + 63, offset + 64]
    kvm.write(63 + 8, 2)
    assert offset + 63 in kvm.sync(user)


@pytest.mark.parametrize("shift", [0, 5, 64])
def test_rule_4_a_page_seen_twice_is_one_page(board, shift: int) -> None:
    """The first slot shows pages 0 to 99, the second pages ``shift`` to 99 again, elsewhere."""
    kvm = board(slot(0, 0, 100, 0), slot(1, 100, 100 - shift, shift))
    user, other = kvm.hub.open("one"), kvm.hub.open("two")
    clean(kvm, user)
    kvm.take(other)
    kvm.write(70)
    assert kvm.sync(user) == [70], "through the first"
    kvm.take(user)
    kvm.write(100 + 80 - shift, 3)
    assert kvm.sync(user) == [80], "through the second"
    kvm.take(user)
    kvm.write(80, 4)
    kvm.write(100 + 80 - shift, 5)
    assert kvm.sync(user) == [80]
    kvm.take(user)
    assert kvm.sync(user) == [], "cleared in both"
    assert kvm.take(other) == [70, 80]


def test_rule_5_what_was_written_through_a_slot_that_goes_is_not_lost(board) -> None:
    kvm = board(slot(0, 0, 100, 0), slot(1, 100, 100, 100))
    user = kvm.hub.open("one")
    clean(kvm, user)
    kvm.write(150)
    kvm.change(slot(0, 0, 100, 0))
    assert 150 in kvm.sync(user)
    kvm.take(user)
    assert kvm.sync(user) == []
    kvm.write(7)
    assert kvm.sync(user) == [7], "the other slot's log went on"


def test_rule_5_a_slot_that_comes_is_logged(board) -> None:
    kvm = board(slot(0, 0, 100, 0))
    user = kvm.hub.open("one")
    kvm.sync(user)
    kvm.take(user)
    kvm.change(slot(0, 0, 100, 0), slot(1, 100, 100, 100))
    assert set(kvm.take(user)) >= set(range(100, 200)), "all of it may have been written"
    kvm.sync(user)
    kvm.take(user)
    kvm.write(150)
    kvm.write(50)
    assert kvm.sync(user) == [50, 150]


def test_rule_5_a_slot_that_is_resized_is_logged_in_its_new_size(board) -> None:
    kvm = board(slot(0, 0, 100, 0))
    user = kvm.hub.open("one")
    kvm.sync(user)
    kvm.take(user)
    kvm.write(42)
    kvm.change(slot(0, 0, 130, 0))
    kvm.write(43)
    kvm.write(129)
    assert {42, 43, 129} <= set(kvm.sync(user))
    kvm.take(user)
    kvm.sync(user)
    kvm.take(user)
    kvm.write(129, 2)
    assert kvm.sync(user) == [129]
    kvm.change(slot(0, 0, 64, 0))
    kvm.write(63)
    assert {63, 129} <= set(kvm.sync(user))


def test_rule_5_the_same_slot_at_another_place_starts_anew(board) -> None:
    """The cache dies with its slot: what it knew of pages 0 to 99 must not clear news of pages 100 to 199."""
    kvm = board(slot(0, 0, 100, 0))
    user, other = kvm.hub.open("one"), kvm.hub.open("two")
    clean(kvm, user)
    kvm.write(10)
    kvm.sync(user)
    kvm.change(slot(0, 0, 100, 100))
    kvm.write(10, 2)
    kvm.take(user, 0, 100)
    assert 110 in kvm.sync(user), "page 10 of the slot is page 110 of the region now"
    assert {10, 110} <= set(kvm.take(other))


def test_rule_5_a_take_for_the_old_map_is_refused(board) -> None:
    kvm = board(slot(0, 0, 100, 0), slot(1, 100, 100, 100))
    user = kvm.hub.open("one")
    old = kvm.generation
    kvm.change(slot(0, 0, 100, 0))
    with pytest.raises(ControlError) as caught:
        user.take_and_clear(0, 0, 100, old)
    assert caught.value.code == "stale-generation"


def test_rule_5_logging_off_and_on_again_after_slots_have_changed(board) -> None:
    kvm = board(slot(0, 0, 100, 0), slot(1, 100, 100, 100))
    user = kvm.hub.open("one")
    kvm.change(slot(0, 0, 100, 0))
    user.close()
    user = kvm.hub.open("two", "ring" if kvm.ring else "auto-clear")
    assert kvm.log.logging == {0}, "what was known of the slot that went is forgotten"
    user.close()
    kvm.change(slot(0, 0, 100, 0), slot(1, 100, 100, 100))
    user = kvm.hub.open("three")
    assert kvm.take(user) == list(range(PAGES))
    kvm.sync(user)
    kvm.take(user)
    kvm.write(199)
    assert kvm.sync(user) == [199]
    user.close()
    with pytest.raises((KvmError, KeyError)):
        kvm.log.get(1, np.zeros(4, np.uint64))


def test_rule_2_what_no_sync_has_named_is_not_cleared(board) -> None:
    kvm = board(slot(0, 0, PAGES, 0))
    user = kvm.hub.open("one")
    clean(kvm, user)
    kvm.write(70)
    assert kvm.sync(user) == [70]
    kvm.write(71)
    assert kvm.take(user, 60, 20) == [70]
    assert kvm.sync(user) == [71]


def test_rule_2_a_log_that_starts_all_set_clears_nothing_before_its_first_get() -> None:
    kvm = Board("ones first", slot(0, 0, PAGES, 0))
    try:
        seen: list[str] = []
        get, clear = kvm.log.get, kvm.log.clear
        kvm.log.get = lambda *a: (seen.append("get"), get(*a))[1]  # type: ignore[method-assign]
        kvm.log.clear = lambda *a: (seen.append("clear"), clear(*a))[1]  # type: ignore[method-assign]
        user = kvm.hub.open("one")
        kvm.write(5)
        assert kvm.take(user) == list(range(PAGES))
        assert seen == ["get", "clear"]
        assert kvm.sync(user) == [], "written before its first take: sent once"
    finally:
        kvm.close()
