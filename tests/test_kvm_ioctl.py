"""A failed ioctl names the request, the errno and the remedy; so does every call on a descriptor that is no KVM."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from amig.errors import KvmError
from amig.kvm import ioctl as ioctl_module
from amig.kvm.abi_numbers import Cap, Irqchip, MpState, Request
from amig.kvm.abi_vcpu import KvmDebugregs, KvmFpu, KvmLapicState, KvmRegs, KvmSregs, KvmSregs2, KvmVcpuEvents, KvmXcrs
from amig.kvm.abi_vm import KvmPitState2
from amig.kvm.ioctl import ioctl, run
from amig.kvm.system import Kvm
from amig.kvm.vcpu import Vcpu
from amig.kvm.vm import Region, Vm


def null() -> int:
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


@pytest.fixture
def bad_kvm() -> Iterator[Kvm]:
    with Kvm(null(), "/dev/null") as kvm:
        yield kvm


@pytest.fixture
def bad_vm() -> Iterator[Vm]:
    with Vm(null(), vcpu_mmap_size=4096, msr_indices=()) as vm:
        vm._regions[0] = Region(slot=0, guest_phys=0, size=64 * 4096, host_addr=0, flags=0)
        vm.has_irqchip = True
        yield vm


@pytest.fixture
def bad_vcpu() -> Iterator[Vcpu]:
    with Vcpu(null(), 0, run=mmap.mmap(-1, 4096), ring=None, xsave_size=4096, sregs2=True) as vcpu:
        yield vcpu


BITMAP = np.zeros(1, dtype=np.uint64)

KVM_CALLS: dict[str, Callable[[Kvm], object]] = {
    "KVM_CREATE_VM": Kvm.create_vm,
    "KVM_CHECK_EXTENSION": lambda kvm: kvm.check_extension(Cap.IRQCHIP),
    "KVM_GET_SUPPORTED_CPUID": Kvm.supported_cpuid,
    "KVM_GET_MSR_INDEX_LIST": Kvm.msr_index_list,
    "KVM_GET_MSR_FEATURE_INDEX_LIST": Kvm.msr_feature_index_list,
    "KVM_GET_VCPU_MMAP_SIZE": Kvm.vcpu_mmap_size,
    "KVM_GET_API_VERSION": lambda kvm: kvm._check("/dev/null", ()),
}
VM_CALLS: dict[str, Callable[[Vm], object]] = {
    "KVM_CREATE_VCPU": lambda vm: vm.create_vcpu(0),
    "KVM_GET_DIRTY_LOG": lambda vm: vm.get_dirty_log(0, BITMAP),
    "KVM_CLEAR_DIRTY_LOG": lambda vm: vm.clear_dirty_log(0, 0, 64, BITMAP),
    "KVM_SET_USER_MEMORY_REGION": lambda vm: vm.set_memory_region(0, 0, 4096, 0),
    "KVM_SET_TSS_ADDR": lambda vm: vm.set_tss_addr(0xFFFB_D000),
    "KVM_SET_IDENTITY_MAP_ADDR": lambda vm: vm.set_identity_map_addr(0xFFFB_C000),
    "KVM_CREATE_IRQCHIP": Vm.create_irqchip,
    "KVM_IRQ_LINE": lambda vm: vm.irq_line(4, True),
    "KVM_GET_IRQCHIP": lambda vm: vm.get_irqchip(Irqchip.IOAPIC),
    "KVM_SET_IRQCHIP": lambda vm: vm.set_irqchip(Irqchip.IOAPIC, bytes(512)),
    "KVM_CREATE_PIT2": Vm.create_pit2,
    "KVM_GET_PIT2": Vm.get_pit2,
    "KVM_SET_PIT2": lambda vm: vm.set_pit2(KvmPitState2()),
    "KVM_GET_CLOCK": Vm.get_clock,
    "KVM_SET_CLOCK": lambda vm: vm.set_clock(1),
    "KVM_ENABLE_CAP": lambda vm: vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, 1),
    "KVM_RESET_DIRTY_RINGS": Vm.reset_dirty_rings,
}
VCPU_CALLS: dict[str, Callable[[Vcpu], object]] = {
    "KVM_RUN": Vcpu.run,
    "KVM_GET_REGS": Vcpu.get_regs,
    "KVM_SET_REGS": lambda vcpu: vcpu.set_regs(KvmRegs()),
    "KVM_GET_SREGS": Vcpu.get_sregs,
    "KVM_SET_SREGS": lambda vcpu: vcpu.set_sregs(KvmSregs()),
    "KVM_GET_SREGS2": Vcpu.get_sregs2,
    "KVM_SET_SREGS2": lambda vcpu: vcpu.set_sregs2(KvmSregs2()),
    "KVM_GET_FPU": Vcpu.get_fpu,
    "KVM_SET_FPU": lambda vcpu: vcpu.set_fpu(KvmFpu()),
    "KVM_GET_XSAVE": Vcpu.get_xsave,
    "KVM_SET_XSAVE": lambda vcpu: vcpu.set_xsave(bytes(4096)),
    "KVM_GET_XCRS": Vcpu.get_xcrs,
    "KVM_SET_XCRS": lambda vcpu: vcpu.set_xcrs(KvmXcrs()),
    "KVM_GET_DEBUGREGS": Vcpu.get_debugregs,
    "KVM_SET_DEBUGREGS": lambda vcpu: vcpu.set_debugregs(KvmDebugregs()),
    "KVM_GET_LAPIC": Vcpu.get_lapic,
    "KVM_SET_LAPIC": lambda vcpu: vcpu.set_lapic(KvmLapicState()),
    "KVM_GET_VCPU_EVENTS": Vcpu.get_vcpu_events,
    "KVM_SET_VCPU_EVENTS": lambda vcpu: vcpu.set_vcpu_events(KvmVcpuEvents()),
    "KVM_GET_MP_STATE": Vcpu.get_mp_state,
    "KVM_SET_MP_STATE": lambda vcpu: vcpu.set_mp_state(MpState.RUNNABLE),
    "KVM_GET_MSRS": lambda vcpu: vcpu.get_msrs([0x10]),
    "KVM_SET_MSRS": lambda vcpu: vcpu.set_msrs([(0x10, 0)]),
    "KVM_GET_CPUID2": Vcpu.get_cpuid2,
    "KVM_SET_CPUID2": lambda vcpu: vcpu.set_cpuid2(()),
    "KVM_SET_SIGNAL_MASK": lambda vcpu: vcpu.set_signal_mask(()),
    "KVM_GET_TSC_KHZ": Vcpu.get_tsc_khz,
    "KVM_SET_TSC_KHZ": lambda vcpu: vcpu.set_tsc_khz(1_000_000),
}


def refused(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(KvmError) as caught:
        call()
    assert caught.value.request == name
    assert caught.value.errno == errno.ENOTTY
    assert name in str(caught.value)
    assert "ENOTTY" in str(caught.value)
    assert "not a KVM descriptor" in str(caught.value)


@pytest.mark.parametrize("name", KVM_CALLS)
def test_system_calls_on_no_kvm(name: str, bad_kvm: Kvm) -> None:
    refused(name, lambda: KVM_CALLS[name](bad_kvm))


@pytest.mark.parametrize("name", VM_CALLS)
def test_vm_calls_on_no_kvm(name: str, bad_vm: Vm) -> None:
    refused(name, lambda: VM_CALLS[name](bad_vm))


@pytest.mark.parametrize("name", VCPU_CALLS)
def test_vcpu_calls_on_no_kvm(name: str, bad_vcpu: Vcpu) -> None:
    refused(name, lambda: VCPU_CALLS[name](bad_vcpu))


def test_xsave2_on_no_kvm() -> None:
    with Vcpu(null(), 0, run=mmap.mmap(-1, 4096), ring=None, xsave_size=8192, sregs2=True) as vcpu:
        refused("KVM_GET_XSAVE2", vcpu.get_xsave)


def test_a_guest_without_a_kvm_clock_is_no_error(bad_vcpu: Vcpu) -> None:
    assert bad_vcpu.kvmclock_ctrl() is False


def test_the_tables_name_every_request() -> None:
    named = {*KVM_CALLS, *VM_CALLS, *VCPU_CALLS, "KVM_GET_XSAVE2", "KVM_KVMCLOCK_CTRL"}
    assert named == {request.name for request in Request}


@pytest.mark.parametrize("calls", ["kvm", "vm", "vcpu"])
def test_a_closed_handle_says_so(calls: str, bad_kvm: Kvm, bad_vm: Vm, bad_vcpu: Vcpu) -> None:
    handle, table = {"kvm": (bad_kvm, KVM_CALLS), "vm": (bad_vm, VM_CALLS), "vcpu": (bad_vcpu, VCPU_CALLS)}[calls]
    handle.close()
    handle.close()
    assert handle.closed
    for name, call in table.items():
        if name != "KVM_GET_API_VERSION":
            with pytest.raises(KvmError, match=f"{name} on a .* that is closed"):
                call(handle)


def interrupt(monkeypatch: pytest.MonkeyPatch, answers: list[int]) -> None:
    """Let ioctl fail with these errnos in turn, then succeed with 5."""

    def fake(fd: int, request: int, arg: int) -> int:
        if answers:
            ctypes.set_errno(answers.pop(0))
            return -1
        return 5

    monkeypatch.setattr(ioctl_module, "_ioctl", fake)


def test_an_interrupted_request_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, [errno.EINTR, errno.EINTR])
    assert ioctl(0, Request.KVM_CREATE_VM) == 5


def test_a_request_that_is_always_interrupted_fails_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, [errno.EINTR] * 5000)
    with pytest.raises(KvmError, match="EINTR"):
        ioctl(0, Request.KVM_CREATE_VM)


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN])
def test_an_interrupted_run_is_handed_back(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    interrupt(monkeypatch, [number])
    assert run(0) is False
    assert run(0) is True


def test_an_errno_without_advice_is_still_named(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, [errno.EDOM])
    with pytest.raises(KvmError, match=r"KVM_RUN failed: EDOM \(Numerical argument out of domain\)$"):
        run(0)
