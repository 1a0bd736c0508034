"""Take the state of a resting vCPU or VM, and give it to another one: which calls, in which order.

Clock policy: **freeze**. The TSC and the KVM clock go on from the values they had when the guest was stopped, so that
by its own clocks the guest missed nothing; its wall clock is behind by the downtime until NTP puts that right. All
vCPUs share the TSC of the one restored first, as they did at the source.
"""

from __future__ import annotations

import logging

from ..errors import KvmError, KvmUnavailable, VerifyFailed
from .abi_base import KvmStruct
from .abi_numbers import (
    MSR_IA32_TSC,
    MSR_IA32_TSC_ADJUST,
    MSR_IA32_TSC_DEADLINE,
    Cap,
    Irqchip,
    MpState,
)
from .abi_vcpu import KvmDebugregs, KvmLapicState, KvmRegs, KvmSregs, KvmSregs2, KvmVcpuEvents, KvmXcrs
from .abi_vm import KvmPitState2
from .cpuid import pack_cpuid
from .state import VcpuState, VmState
from .vcpu import Vcpu
from .vm import Vm

log = logging.getLogger(__name__)

TSC_TOLERANCE_PPM = 250
"""KVM's own tolerance (tsc_tolerance_ppm): closer frequencies need no scaling."""

_TIME_MSRS = (MSR_IA32_TSC_ADJUST, MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE)
"""Written last, in this order: an adjustment may move the TSC, and the deadline is compared with it."""


def _blob(value: KvmStruct) -> bytes:
    return bytes(value)


def save_vcpu(vcpu: Vcpu, vm: Vm) -> VcpuState:
    """The whole state of ``vcpu``, which must be resting with no exit half done (`VcpuThread.pause`).

    Reading events and the run state may change other state (an INIT is taken in), so they come first (design, 7).
    """
    events = _blob(vcpu.get_vcpu_events())
    mp_state = int(vcpu.get_mp_state())
    regs = _blob(vcpu.get_regs())
    xsave = vcpu.get_xsave()
    xcrs = _blob(vcpu.get_xcrs())
    sregs = _blob(vcpu.get_sregs2() if vcpu.has_sregs2 else vcpu.get_sregs())
    msrs, unreadable = vcpu.get_msrs(vm.msr_indices)
    if unreadable:
        log.debug("vCPU %d has no MSR %s", vcpu.index, ", ".join(f"{index:#x}" for index in unreadable))
    lapic = _blob(vcpu.get_lapic()) if vm.has_irqchip else None
    debugregs = _blob(vcpu.get_debugregs())
    return VcpuState(
        index=vcpu.index,
        tsc_khz=vcpu.get_tsc_khz(),
        cpuid=pack_cpuid(vcpu.cpuid),
        events=events,
        mp_state=mp_state,
        regs=regs,
        xsave=xsave,
        xcrs=xcrs,
        sregs=sregs,
        msrs=tuple(msrs.items()),
        lapic=lapic,
        debugregs=debugregs,
    )


def restore_vcpu(vcpu: Vcpu, vm: Vm, state: VcpuState) -> None:
    """Give ``vcpu``, which has not run yet, the saved state. Guest memory must be in place already.

    Everything is checked before the first ioctl. Raises VerifyFailed for a state that is broken or does not fit this
    VM, KvmUnavailable where this host can't keep the TSC's frequency, KvmError where KVM refuses a part.
    After an error the vCPU is half restored: discard it. KVM writes the guest's wall-clock page when it gets the
    clock's MSR, so memory is compared before this.
    """
    state.check()
    entries = state.cpuid_entries()
    if (state.lapic is not None) != vm.has_irqchip:
        raise VerifyFailed("the device state does not fit: only one side has in-kernel interrupt controllers")
    if len(state.sregs) == 320 and not vcpu.has_sregs2:
        raise KvmUnavailable("this KVM lacks KVM_CAP_SREGS2, which the state needs: use Linux 5.14 or newer here")
    xsave = _fit_xsave(state.xsave, vcpu.xsave_size)
    _check_tsc(vcpu, vm, state.tsc_khz)

    vcpu.set_cpuid2(entries)
    if vcpu.get_tsc_khz() != state.tsc_khz and vm.check_extension(Cap.TSC_CONTROL):
        vcpu.set_tsc_khz(state.tsc_khz)
    vcpu.set_mp_state(MpState(state.mp_state))
    vcpu.set_regs(KvmRegs.from_blob(state.regs))
    if len(state.sregs) == 320:
        vcpu.set_sregs2(KvmSregs2.from_blob(state.sregs))
    else:
        vcpu.set_sregs(KvmSregs.from_blob(state.sregs))
    vcpu.set_xsave(xsave)
    vcpu.set_xcrs(KvmXcrs.from_blob(state.xcrs))
    vcpu.set_debugregs(KvmDebugregs.from_blob(state.debugregs))
    if state.lapic is not None:
        vcpu.set_lapic(KvmLapicState.from_blob(state.lapic))
    _restore_msrs(vcpu, vm, dict(state.msrs))
    vcpu.set_vcpu_events(KvmVcpuEvents.from_blob(state.events))
    vcpu.kvmclock_ctrl()


def _fit_xsave(xsave: bytes, size: int) -> bytes:
    """Cut an extended state to what this host takes, if the guest never used what is beyond."""
    if any(xsave[size:]):
        text = (
            f"the guest uses {len(xsave)} bytes of extended processor state, this host takes {size}: it lacks a feature"
        )
        raise VerifyFailed(text)
    return xsave[:size]


def tsc_fits(saved_khz: int, here_khz: int, *, scaling: bool) -> bool:
    """Whether a guest that counts on ``saved_khz`` can run where the TSC has ``here_khz`` (kHz). Pure."""
    return scaling or abs(saved_khz - here_khz) * 1_000_000 <= TSC_TOLERANCE_PPM * here_khz


def _check_tsc(vcpu: Vcpu, vm: Vm, khz: int) -> None:
    here = vcpu.get_tsc_khz()
    if not tsc_fits(khz, here, scaling=bool(vm.check_extension(Cap.TSC_CONTROL))):
        raise KvmUnavailable(
            f"the guest's TSC runs at {khz} kHz, this host's at {here} kHz and it can't scale it: "
            "move to a host of the same frequency, or one with TSC scaling"
        )


def _restore_msrs(vcpu: Vcpu, vm: Vm, saved: dict[int, int]) -> None:
    """Write the MSRs that differ from what this vCPU has: those that can't be written hold the value already."""
    current, _ = vcpu.get_msrs([index for index in saved if index not in _TIME_MSRS])
    plain = [(i, value) for i, value in saved.items() if i not in _TIME_MSRS and current.get(i, 0) != value]
    time = [(index, saved[index]) for index in _TIME_MSRS if index in saved]
    if not vm.tsc_restored and MSR_IA32_TSC in saved:
        # A TSC written within a second of where the VM's TSC stands (before Linux 6.7 since the VM's creation) is taken
        # for an attempt to synchronize, and set to that instead: the guest's TSC could step back by a second. So the
        # VM's first vCPU goes far away first. The others are meant to be synchronized with it.
        vcpu.set_msrs([(MSR_IA32_TSC, saved[MSR_IA32_TSC] ^ 1 << 62)])
        vm.tsc_restored = True
    refused = vcpu.set_msrs(plain + time)
    if refused:
        listed = ", ".join(f"{index:#x} (to {saved[index]:#x})" for index in refused)
        raise KvmError(
            f"KVM_SET_MSRS failed: this host refuses MSR {listed}: it lacks a feature that the guest uses",
            request="KVM_SET_MSRS",
        )


def save_vm(vm: Vm) -> VmState:
    """Interrupt controllers, timer and clock; all vCPUs must rest. The clock is read first, at the stop."""
    clock = vm.get_clock().clock
    irqchips = tuple(vm.get_irqchip(chip) for chip in Irqchip) if vm.has_irqchip else ()
    pit = _blob(vm.get_pit2()) if vm.has_pit else None
    return VmState(irqchips=irqchips, pit=pit, clock=clock)


def restore_vm(vm: Vm, state: VmState) -> None:
    """Give ``vm``, whose controllers and timer exist, the saved state, after its vCPUs have theirs.

    The IOAPIC may deliver a pending interrupt at once, which a local APIC restored later would forget.
    Raises VerifyFailed if it is broken or does not fit this VM, before any ioctl; KvmError where KVM refuses a part.
    """
    state.check()
    if bool(state.irqchips) != vm.has_irqchip or (state.pit is not None) != vm.has_pit:
        raise VerifyFailed("the device state does not fit: the two VMs have different interrupt controllers or timers")
    for chip, blob in zip(Irqchip, state.irqchips, strict=False):
        vm.set_irqchip(chip, blob)
    if state.pit is not None:
        vm.set_pit2(KvmPitState2.from_blob(state.pit))
    vm.set_clock(state.clock)


__all__ = ["restore_vcpu", "restore_vm", "save_vcpu", "save_vm", "tsc_fits"]
