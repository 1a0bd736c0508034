"""Save a guest's processor and board, restore them in another VM: equal, and it runs on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from amig.errors import KvmError, KvmUnavailable, VerifyFailed
from amig.kvm import snapshot
from amig.kvm.abi_numbers import ExitReason, MpState
from amig.kvm.cpuid import CpuModel
from amig.kvm.snapshot import restore_vcpu, restore_vm, save_vcpu, save_vm, tsc_fits
from amig.kvm.state import VcpuState, decode, encode
from amig.kvm.vcpu import Vcpu
from amig.kvm.vm import Vm
from tests.conftest import standard_kvm
from tests.tinyguest import TinyGuest

MSR_STAR, MSR_LSTAR, MSR_TSC, MSR_KERNEL_GS = 0xC0000081, 0xC0000082, 0x10, 0xC0000102

RUNNING_MSRS = (MSR_TSC, 0x4000_0010, 0x4000_0020)
"""TSC, and Hyper-V's run time and reference counter: they do not stand still."""

COUNT = bytes.fromhex("ff060020 a10020 e780 ebf5")
"""``again: inc word [0x2000]; mov ax, [0x2000]; out 0x80, ax; jmp again``"""


@pytest.fixture
def source() -> Iterator[TinyGuest]:
    with TinyGuest(COUNT, irqchip=True) as guest:
        yield guest


@pytest.fixture
def target() -> Iterator[TinyGuest]:
    with TinyGuest(b"", irqchip=True) as guest:
        guest.vcpu.close()
        guest.vm.close()
        guest.vm = guest.kvm.create_vm()
        guest.vm.set_tss_addr(0xFFFB_D000)
        guest.vm.set_identity_map_addr(0xFFFB_C000)
        guest.vm.create_irqchip()
        guest.vm.create_pit2()
        guest.vm.set_memory_region(0, 0, guest.pages * 4096, guest.address)
        guest.vcpu = guest.vm.create_vcpu(0)
        yield guest


def count_once(guest: TinyGuest) -> int:
    assert guest.vcpu.run() is ExitReason.IO
    at = guest.vcpu.kvm_run().exit.io.data_offset
    return int.from_bytes(guest.vcpu.run_page[at : at + 2], "little")


def finish_exit(vcpu: Vcpu) -> None:
    vcpu.set_immediate_exit(True)
    assert vcpu.run() is None
    vcpu.set_immediate_exit(False)


def prepare(guest: TinyGuest) -> None:
    """Run a little, and set something in every part of the state."""
    assert [count_once(guest) for _ in range(5)] == [1, 2, 3, 4, 5]
    finish_exit(guest.vcpu)
    vcpu = guest.vcpu
    regs = vcpu.get_regs()
    regs.r8, regs.rsi, regs.rsp = 0x0123_4567_89AB_CDEF, 0xFFFF_FFFF_0000_0001, 0x7000
    vcpu.set_regs(regs)
    sregs = vcpu.get_sregs()
    sregs.cr2, sregs.gdt.base, sregs.gdt.limit, sregs.es.base, sregs.es.selector = 0x1234, 0x3000, 0x17, 0x40000, 0x4000
    vcpu.set_sregs(sregs)
    xsave = bytearray(vcpu.get_xsave())
    xsave[160:176] = bytes(range(16))
    xsave[512] |= 2
    vcpu.set_xsave(bytes(xsave))
    debugregs = vcpu.get_debugregs()
    debugregs.db[2] = 0x5555
    vcpu.set_debugregs(debugregs)
    lapic = vcpu.get_lapic()
    lapic.regs[0x80], lapic.regs[0xF1] = 0x20, lapic.regs[0xF1] | 1  # task priority; enabled by software
    vcpu.set_lapic(lapic)
    assert vcpu.set_msrs([(MSR_STAR, 0x1122_3344_5566_7788), (MSR_LSTAR, 0x4000), (MSR_KERNEL_GS, 0x9000)]) == []
    events = vcpu.get_vcpu_events()
    events.nmi_masked = 1
    vcpu.set_vcpu_events(events)
    guest.vm.irq_line(4, True)
    pit = guest.vm.get_pit2()
    pit.channels[2].count, pit.channels[2].mode = 0x4321, 3  # not channel 0: that would raise interrupts meanwhile
    guest.vm.set_pit2(pit)


def different(one: VcpuState, two: VcpuState) -> dict[str | int, tuple[object, object]]:
    """The parts that differ, and MSRs by number, less what does not stand still."""
    parts: list[dict[str | int, object]] = [
        {
            **{name: getattr(state, name) for name in state.__struct_fields__ if name != "msrs"},
            **{index: value for index, value in state.msrs if index not in RUNNING_MSRS},
        }
        for state in (one, two)
    ]
    names = parts[0].keys() | parts[1].keys()
    return {n: (parts[0].get(n), parts[1].get(n)) for n in names if parts[0].get(n) != parts[1].get(n)}


@pytest.mark.kvm
def test_a_guest_restored_in_another_vm_is_equal_and_runs_on(source: TinyGuest, target: TinyGuest) -> None:
    prepare(source)
    vcpu_state, vm_state = save_vcpu(source.vcpu, source.vm), save_vm(source.vm)
    target.memory[:] = source.memory[:]
    arrived_vcpu, arrived_vm = decode(encode(vcpu_state)), decode(encode(vm_state))
    assert arrived_vcpu == vcpu_state
    restore_vcpu(target.vcpu, target.vm, arrived_vcpu)
    restore_vm(target.vm, arrived_vm)
    again = save_vcpu(target.vcpu, target.vm)
    assert different(again, vcpu_state) == {}
    board = save_vm(target.vm)
    assert board.irqchips == vm_state.irqchips
    assert target.vm.get_pit2().channels[2].count == 0x4321
    assert vm_state.clock <= board.clock < vm_state.clock + 60_000_000_000
    if standard_kvm():  # a software KVM has no TSC of its own for the guest
        assert 0 <= dict(again.msrs)[MSR_TSC] - dict(vcpu_state.msrs)[MSR_TSC] < vcpu_state.tsc_khz * 60_000
    assert dict(again.msrs)[MSR_STAR] == 0x1122_3344_5566_7788
    assert [count_once(target) for _ in range(3)] == [6, 7, 8]
    assert target.vcpu.get_regs().r8 == 0x0123_4567_89AB_CDEF


@pytest.mark.lab
def test_the_tsc_goes_on_from_where_it_was_saved(source: TinyGuest, target: TinyGuest) -> None:
    saved = save_vcpu(source.vcpu, source.vm)
    future = dict(saved.msrs) | {MSR_TSC: 1 << 60}
    state = decode(encode(change(saved, msrs=tuple(future.items()))))
    assert isinstance(state, VcpuState)
    restore_vcpu(target.vcpu, target.vm, state)
    now = target.vcpu.get_msrs([MSR_TSC])[0][MSR_TSC]
    assert 1 << 60 <= now < (1 << 60) + saved.tsc_khz * 60_000


@pytest.mark.lab
def test_all_vcpus_share_one_tsc(source: TinyGuest, target: TinyGuest) -> None:
    ahead = source.vm.create_vcpu(1)
    states = [save_vcpu(source.vcpu, source.vm), save_vcpu(ahead, source.vm)]
    vcpus = [target.vcpu, target.vm.create_vcpu(1)]
    for vcpu, state in zip(vcpus, states, strict=True):
        restore_vcpu(vcpu, target.vm, state)
    first, second, third = (vcpus[n].get_msrs([MSR_TSC])[0][MSR_TSC] for n in (0, 1, 0))
    assert dict(states[0].msrs)[MSR_TSC] < first < second < third


@pytest.mark.kvm
def test_a_waiting_vcpu_waits_on(source: TinyGuest, target: TinyGuest) -> None:
    second = source.vm.create_vcpu(1)
    second.set_cpuid2(CpuModel.host(source.kvm.supported_cpuid()).for_vcpu(1, 2))
    state = save_vcpu(second, source.vm)
    assert state.mp_state == MpState.UNINITIALIZED
    other = target.vm.create_vcpu(1)
    restore_vcpu(other, target.vm, state)
    assert other.get_mp_state() is MpState.UNINITIALIZED
    assert different(save_vcpu(other, target.vm), state) == {}


@pytest.mark.kvm
def test_without_interrupt_controllers_there_is_none_to_save() -> None:
    with TinyGuest(COUNT) as one, TinyGuest(COUNT) as two:
        state, board = save_vcpu(one.vcpu, one.vm), save_vm(one.vm)
        assert (state.lapic, board.irqchips, board.pit) == (None, (), None)
        restore_vcpu(two.vcpu, two.vm, state)
        restore_vm(two.vm, board)
        assert count_once(two) == 1


def change(state: VcpuState, **fields: object) -> VcpuState:
    return VcpuState(**{**{name: getattr(state, name) for name in state.__struct_fields__}, **fields})  # type: ignore[arg-type]


@pytest.mark.kvm
def test_a_state_that_does_not_fit_is_refused_before_anything_is_touched(
    source: TinyGuest, target: TinyGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, board = save_vcpu(source.vcpu, source.vm), save_vm(source.vm)
    before = bytes(target.vcpu.get_regs()), target.vm.get_irqchip(snapshot.Irqchip.IOAPIC)

    def no_ioctl(*_: object) -> None:
        raise AssertionError("touched")

    monkeypatch.setattr(Vcpu, "_set", no_ioctl)
    monkeypatch.setattr(Vm, "_set", no_ioctl)
    for bad in (
        change(state, regs=bytes(10)),
        change(state, lapic=None),
        change(state, xsave=state.xsave + bytes(4092) + b"\1\0\0\0"),
        change(state, version=7),
    ):
        with pytest.raises(VerifyFailed):
            restore_vcpu(target.vcpu, target.vm, bad)
    for bad_board in (
        type(board)(irqchips=(), pit=board.pit, clock=1),
        type(board)(irqchips=board.irqchips, pit=None, clock=1),
        type(board)(irqchips=board.irqchips[:1], pit=board.pit, clock=1),
    ):
        with pytest.raises(VerifyFailed):
            restore_vm(target.vm, bad_board)
    target.vcpu.has_sregs2 = False
    with pytest.raises(KvmUnavailable, match="KVM_CAP_SREGS2"):
        restore_vcpu(target.vcpu, target.vm, state)
    target.vcpu.has_sregs2 = True
    monkeypatch.setattr(Vm, "check_extension", lambda self, cap: 0)
    with pytest.raises(KvmUnavailable, match="can't scale it"):
        restore_vcpu(target.vcpu, target.vm, change(state, tsc_khz=state.tsc_khz // 2))
    monkeypatch.undo()
    assert (bytes(target.vcpu.get_regs()), target.vm.get_irqchip(snapshot.Irqchip.IOAPIC)) == before


@pytest.mark.kvm
def test_an_unused_tail_of_extended_state_is_cut(source: TinyGuest, target: TinyGuest) -> None:
    state = save_vcpu(source.vcpu, source.vm)
    restore_vcpu(target.vcpu, target.vm, change(state, xsave=state.xsave + bytes(4096)))
    assert target.vcpu.get_xsave() == state.xsave


@pytest.mark.kvm
def test_an_msr_that_the_destination_lacks_is_named_unless_it_holds_nothing(
    source: TinyGuest, target: TinyGuest
) -> None:
    state = save_vcpu(source.vcpu, source.vm)
    restore_vcpu(target.vcpu, target.vm, change(state, msrs=(*state.msrs, (0x1234_5678, 0))))
    with pytest.raises(KvmError, match=r"refuses MSR 0x12345678 \(to 0x7\)"):
        restore_vcpu(target.vcpu, target.vm, change(state, msrs=(*state.msrs, (0x1234_5678, 7))))


@pytest.mark.kvm
def test_the_order_of_calls_is_the_one_that_loses_nothing(
    source: TinyGuest, target: TinyGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in dir(Vcpu):
        if name.startswith(("get_", "set_")):

            def spy(self: Vcpu, *args: object, _name: str = name, _real: object = getattr(Vcpu, name)) -> object:
                order.append(_name)
                return _real(self, *args)  # type: ignore[operator]

            monkeypatch.setattr(Vcpu, name, spy)
    state = save_vcpu(source.vcpu, source.vm)
    saving = [name[4:] for name in order if name not in ("get_tsc_khz", "get_cpuid2")]
    assert saving == ["vcpu_events", "mp_state", "regs", "xsave", "xcrs", "sregs2", "msrs", "lapic", "debugregs"]
    order.clear()
    restore_vcpu(target.vcpu, target.vm, state)
    restoring = [name[4:] for name in order if name.startswith("set_") and name != "set_tsc_khz"]
    assert restoring == (
        ["cpuid2", "mp_state", "regs", "sregs2", "xsave", "xcrs", "debugregs", "lapic", "msrs", "msrs", "vcpu_events"]
    )


@pytest.mark.kvm
def test_the_tsc_is_written_after_its_adjustment_and_before_its_deadline(
    target: TinyGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(Vcpu, "set_msrs", lambda self, pairs: written.extend(index for index, _ in pairs) or [])
    snapshot._restore_msrs(target.vcpu, target.vm, {0x6E0: 5, 0x10: 6, MSR_STAR: 7, 0x3B: 8})
    assert written == [0x10, MSR_STAR, 0x3B, 0x10, 0x6E0]  # the first is the step away


@pytest.mark.parametrize(
    ("saved", "here", "scaling", "fits"),
    [
        (2_000_000, 2_000_000, False, True),
        (2_000_499, 2_000_000, False, True),
        (1_999_501, 2_000_000, False, True),
        (2_000_501, 2_000_000, False, False),
        (3_000_000, 2_000_000, False, False),
        (3_000_000, 2_000_000, True, True),
    ],
)
def test_which_tsc_frequencies_fit(saved: int, here: int, scaling: bool, fits: bool) -> None:
    assert tsc_fits(saved, here, scaling=scaling) is fits
