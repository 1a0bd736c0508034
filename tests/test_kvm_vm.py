"""A VM on real KVM: slots, the dirty log in both modes, the ring, interrupt controllers, clock."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from amig.errors import KvmError, KvmUnavailable, UsageError
from amig.kvm.abi_numbers import Cap, ExitReason, Irqchip, ManualProtect, MpState
from amig.kvm.dirty_log import words
from amig.kvm.ring import ENTRY, DirtyRing
from amig.kvm.system import Kvm
from tests.tinyguest import CODE, TinyGuest

pytestmark = pytest.mark.kvm


def test_reading_the_log_twice_gives_the_same_bits_in_manual_mode() -> None:
    with TinyGuest(manual=False) as guest:
        assert guest.protect is ManualProtect.ENABLE
        guest.log()
        assert guest.dirty() == []
        guest.write(3)
        guest.write(70)
        assert guest.dirty() == [3, 70]
        guest.write(199)
        assert guest.dirty() == [3, 70, 199]


def test_a_clear_takes_the_chosen_bits_only_and_the_next_write_marks_again() -> None:
    with TinyGuest(manual=False) as guest:
        guest.log()
        for page in (3, 70, 71):
            guest.write(page)
        guest.dirty()
        guest.clear([70])
        assert guest.dirty() == [3, 71]
        guest.write(70, 2)
        assert guest.dirty() == [3, 70, 71]
        guest.clear([71], first=64, count=64)
        assert guest.dirty() == [3, 70]


def test_clearing_a_clean_page_does_nothing_and_a_page_dirtied_since_the_get_is_lost() -> None:
    with TinyGuest(manual=False) as guest:
        guest.log()
        guest.clear([5])
        guest.write(5)
        assert guest.dirty() == [5]
        guest.clear([5, 6])
        assert guest.dirty() == []


def test_initially_set_marks_every_page_when_logging_starts() -> None:
    with TinyGuest(manual=True) as guest:
        assert guest.protect is ManualProtect.ENABLE | ManualProtect.INITIALLY_SET
        guest.log()
        assert guest.dirty() == [page for page in range(guest.pages) if page != CODE >> 12]
        guest.clear(list(range(guest.pages)))
        assert guest.dirty() == []
        guest.write(9)
        assert guest.dirty() == [9]
        guest.log(False)
        guest.log()
        assert len(guest.dirty()) == guest.pages - 1


def test_without_manual_mode_reading_clears() -> None:
    with TinyGuest() as guest:
        guest.log()
        guest.write(3)
        assert guest.dirty() == [3]
        assert guest.dirty() == []
        guest.write(3, 2)
        assert guest.dirty() == [3]


def test_manual_mode_can_be_left_again() -> None:
    with TinyGuest(manual=False) as guest:
        guest.vm.disable_manual_protect()
        guest.log()
        guest.write(3)
        assert guest.dirty() == [3]
        assert guest.dirty() == []


def test_a_kvm_without_manual_mode_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with TinyGuest() as guest:
        monkeypatch.setattr(guest.vm, "check_extension", lambda cap: 0)
        assert guest.vm.enable_manual_protect(initially_set=True) is ManualProtect.NONE
        with pytest.raises(KvmUnavailable, match="no dirty ring"):
            guest.vm.enable_dirty_ring(65536)


@pytest.mark.parametrize(
    ("first", "count", "text"),
    [
        (1, 64, "first_page must be a multiple of 64, not 1"),
        (-64, 64, "first_page must be a multiple of 64, not -64"),
        (0, 63, "num_pages must be a multiple of 64 or end the slot, not 63"),
        (64, 100, "num_pages must be a multiple"),
        (0, 256, "leave slot 0, which has 200"),
        (256, 0, "leave slot 0"),
        (0, -64, "leave slot 0"),
    ],
)
def test_an_unaligned_clear_is_refused(first: int, count: int, text: str) -> None:
    with TinyGuest(pages=200, manual=False) as guest:
        guest.log()
        with pytest.raises(UsageError, match=text):
            guest.vm.clear_dirty_log(0, first, count, np.zeros(4, dtype=np.uint64))


def test_a_clear_may_end_with_the_slot_off_the_grid() -> None:
    with TinyGuest(pages=200, manual=False) as guest:
        guest.log()
        guest.write(199)
        guest.write(127)
        assert guest.dirty() == [127, 199]
        guest.clear([199], first=192, count=8)
        assert guest.dirty() == [127]
        guest.clear([], first=192, count=0)


def test_bitmaps_that_do_not_fit_are_refused_before_the_kernel_writes_past_them() -> None:
    with TinyGuest(pages=200, manual=False) as guest:
        guest.log()
        assert words(200) == 4
        readonly = np.zeros(4, dtype=np.uint64)
        readonly.flags.writeable = False
        for bitmap, text in (
            (np.zeros(3, dtype=np.uint64), "has 3 words, 4 are needed"),
            (np.zeros(8, dtype=np.uint32), "array of uint64"),
            (np.zeros((2, 2), dtype=np.uint64), "one-dimensional"),
            (np.zeros(8, dtype=np.uint64)[::2], "contiguous"),
            (readonly, "must be writable"),
        ):
            with pytest.raises(UsageError, match=text):
                guest.vm.get_dirty_log(0, bitmap)
        with pytest.raises(UsageError, match="has 1 words, 2 are needed"):
            guest.vm.clear_dirty_log(0, 0, 128, np.zeros(1, dtype=np.uint64))


def test_an_unlogged_or_missing_slot_says_so() -> None:
    with TinyGuest(manual=False) as guest:
        with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG failed: ENOENT .*its dirty log is off"):
            guest.dirty()
        with pytest.raises(UsageError, match="memory slot 7 does not exist"):
            guest.vm.get_dirty_log(7, np.zeros(4, dtype=np.uint64))


def test_slots_are_added_and_deleted() -> None:
    with TinyGuest() as guest:
        more = mmap.mmap(-1, 8192)
        vm = guest.vm
        with pytest.raises(KvmError, match=r"EEXIST .*overlaps another slot"):
            vm.set_memory_region(1, 0x1000, 4096, guest.address)
        with pytest.raises(KvmError, match=r"EINVAL .*multiples of 4 KiB"):
            vm.set_memory_region(1, 1 << 30, 100, guest.address)
        vm.set_memory_region(1, 1 << 30, 4096, guest.address, readonly=True)
        assert vm.region(1).pages == 1
        assert list(vm.regions) == [0, 1]
        vm.delete_memory_region(1)
        assert list(vm.regions) == [0]
        more.close()


def test_the_board() -> None:
    with Kvm.open() as kvm, kvm.create_vm() as vm:
        vm.set_tss_addr(0xFFFB_D000)  # above 0x7fffffff: refused by fcntl.ioctl
        vm.set_identity_map_addr(0xFFFB_C000)
        with pytest.raises(UsageError, match="before the timer"):
            vm.create_pit2()
        vm.create_irqchip()
        vm.create_pit2()
        with pytest.raises(KvmError, match="KVM_CREATE_IRQCHIP failed: EEXIST"):
            vm.create_irqchip()
        for chip in Irqchip:
            state = vm.get_irqchip(chip)
            vm.set_irqchip(chip, state)
            assert vm.get_irqchip(chip) == state
        with pytest.raises(ValueError, match="512 bytes, not 3"):
            vm.set_irqchip(Irqchip.IOAPIC, b"abc")
        vm.irq_line(4, True)
        assert vm.get_irqchip(Irqchip.PIC_MASTER)[1] & 1 << 4  # the request register
        vm.irq_line(4, False)
        pit = vm.get_pit2()
        pit.channels[0].mode = 2
        pit.channels[0].count = 0x1234
        vm.set_pit2(pit)
        assert vm.get_pit2().channels[0].count == 0x1234
        vm.set_clock(1_000_000_000_000)
        assert 1_000_000_000_000 <= vm.get_clock().clock < 1_100_000_000_000
        first, second = vm.create_vcpu(0), vm.create_vcpu(1)
        assert vm.vcpus == (first, second)
        assert (first.get_mp_state(), second.get_mp_state()) == (MpState.RUNNABLE, MpState.UNINITIALIZED)
        with pytest.raises(KvmError, match="KVM_CREATE_VCPU failed: EEXIST"):
            vm.create_vcpu(1)
        second.close()
        assert vm.vcpus == (first,)
    assert first.closed


def test_closing_the_vm_closes_everything() -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    with TinyGuest(irqchip=True):
        pass
    assert len(sorted(Path("/proc/self/fd").iterdir())) == len(before)


def ring_guest(size: int = 65536) -> TinyGuest:
    """A guest with a second VM whose vCPU logs by ring (the ring is chosen before the first vCPU)."""
    guest = TinyGuest()
    guest.vm.close()
    guest.vm = guest.kvm.create_vm()
    guest.vm.enable_dirty_ring(size)
    guest.vm.set_tss_addr(0xFFFB_D000)
    guest.vm.set_identity_map_addr(0xFFFB_C000)
    guest.vm.set_memory_region(0, 0, guest.pages * 4096, guest.address)
    guest.vcpu = guest.vm.create_vcpu(0)
    return guest


def test_the_dirty_ring_names_written_pages_and_protects_them_again_when_reset() -> None:
    with ring_guest() as guest:
        guest.log()
        ring = guest.vcpu.dirty_ring
        assert ring is not None
        assert ring.entries == 65536 // 16
        assert len(ring.harvest()) == 0
        for page in (7, 9, 7):
            guest.write(page)
        taken = ring.harvest()
        assert set(taken["offset"].tolist()) - {1} == {7, 9}  # the kernel may name a page twice, and the code's
        assert set(taken["slot"].tolist()) == {0}
        assert len(ring.harvest()) == 0
        assert guest.vm.reset_dirty_rings() == len(taken)
        guest.write(7, 3)
        assert set(ring.harvest()["offset"].tolist()) - {1} == {7}
        with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG failed: ENXIO .*harvest the ring"):
            guest.dirty()


def test_a_full_ring_ends_the_run() -> None:
    with ring_guest(4096) as guest:
        guest.log()
        ring = guest.vcpu.dirty_ring
        assert ring is not None
        seen: list[int] = []
        full = False
        for page in [p for p in range(2, 256) if p << 12 != CODE]:
            sregs = guest.vcpu.get_sregs()
            sregs.ds.selector, sregs.ds.base = page << 8, page << 12
            guest.vcpu.set_sregs(sregs)
            guest.start_at(CODE, rax=1, rbx=0)
            while guest.vcpu.run() is ExitReason.DIRTY_RING_FULL:
                full = True
                seen += ring.harvest()["offset"].tolist()
                assert guest.vm.reset_dirty_rings() > 0
        seen += ring.harvest()["offset"].tolist()
        assert full
        assert set(seen) - {1} == set(range(2, 256))


@pytest.mark.parametrize("size", [0, 2048, 65536 + 16, 1 << 40])
def test_a_ring_of_a_size_that_the_kernel_refuses(size: int) -> None:
    with Kvm.open() as kvm, kvm.create_vm() as vm, pytest.raises(UsageError, match="takes a power of two from 4096"):
        vm.enable_dirty_ring(size)


def test_a_ring_after_the_first_vcpu_is_refused() -> None:
    with TinyGuest() as guest, pytest.raises(UsageError, match="before the first vCPU"):
        guest.vm.enable_dirty_ring(65536)


def test_a_harvest_goes_round_the_end_of_the_ring() -> None:
    memory = mmap.mmap(-1, 4096)
    ring, view = DirtyRing(memory), np.frombuffer(memory, dtype=ENTRY)
    count = ring.entries
    view["offset"] = np.arange(count)
    view["flags"][: count - 2] = 1
    assert list(ring.harvest()["offset"]) == list(range(count - 2))
    view["flags"] = 0
    view["flags"][[count - 2, count - 1, 0, 1]] = 1
    assert list(ring.harvest()["offset"]) == [count - 2, count - 1, 0, 1]
    assert list(view["flags"][[count - 2, count - 1, 0, 1, 2]]) == [2, 2, 2, 2, 0]
    view["flags"] = 1
    assert len(ring.harvest()) == count
    del view
    ring.close()


def test_capabilities_of_a_vm() -> None:
    with Kvm.open() as kvm, kvm.create_vm() as vm:
        assert vm.check_extension(Cap.NR_MEMSLOTS) >= 32
