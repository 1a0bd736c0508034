"""Building a virtual machine on KVM: memory slots, interrupt controllers, timer, processors and their first state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amig.errors import UsageError
from amig.host import layout
from amig.host.boot import Entry, Mode
from amig.host.kvm_state import MAX_VCPUS
from amig.host.memory import MappedMemory
from amig.kvm.abi_numbers import Cap, MpState
from amig.kvm.abi_vcpu import KvmRegs, KvmSegment, KvmSregs
from amig.kvm.cpuid import CpuidEntry, CpuModel
from amig.kvm.system import Kvm
from amig.kvm.vcpu import Vcpu
from amig.kvm.vm import Vm

_CR0_PROTECTED, _CR0_PAGING = 0x11, 0x8000_0000
_CR4_PAE = 1 << 5
_EFER_LONG = 1 << 8 | 1 << 10
_MSR_MISC_ENABLE, _FAST_STRING = 0x1A0, 1
_MSR_MTRR_DEFAULT, _MTRR_WRITE_BACK = 0x2FF, 1 << 11 | 6
_CODE, _DATA, _TSS = 0xB, 0x3, 0xB


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A VM with its processors; closing the VM closes them."""

    vm: Vm
    vcpus: tuple[Vcpu, ...]
    seen: tuple[CpuidEntry, ...]
    """What CPUID really answers in vCPU 0; may be more than it was given, see `offered_cpuid`."""

    @property
    def tsc_khz(self) -> int:
        """Frequency of the guest's time stamp counter."""
        return self.vcpus[0].get_tsc_khz()


def cpu_model(kvm: Kvm, words: str) -> CpuModel:
    """Return the processor that ``--cpu`` asks for: ``host``, or ``host,-avx2,-...``; raises `UsageError`."""
    base, *changes = [word.strip() for word in words.split(",")]
    if base != "host" or not all(change.startswith("-") and len(change) > 1 for change in changes):
        raise UsageError(f"unknown processor {words!r}: it is 'host', or 'host' less features, as in 'host,-avx2'")
    return CpuModel.host(
        kvm.supported_cpuid(),
        hide=[change[1:] for change in changes],
        tsc_deadline=bool(kvm.check_extension(Cap.TSC_DEADLINE_TIMER)),
    )


def offered_cpuid(kvm: Kvm) -> tuple[CpuidEntry, ...]:
    """Return what CPUID answers in a guest of this host that asks for all there is.

    That is KVM_GET_SUPPORTED_CPUID on a KVM in hardware. A software KVM lets ring 3 see the host's processor as it is.
    """
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(kvm.supported_cpuid())
        return vcpu.get_cpuid2()


def build(kvm: Kvm, memory: MappedMemory, model: CpuModel, vcpus: int, *, dirty_ring: int = 0) -> Board:
    """Make the VM, with dirty rings of so many bytes if that is not 0.

    Raises `UsageError` for too many vCPUs and an impossible ring, `KvmUnavailable` where there are none, `KvmError`;
    with nothing left behind.
    """
    most = min(kvm.check_extension(Cap.MAX_VCPUS) or MAX_VCPUS, MAX_VCPUS)
    if not 1 <= vcpus <= most:
        raise UsageError(f"{vcpus} vCPUs: this host takes 1 to {most}")
    vm = kvm.create_vm()
    try:
        if dirty_ring:
            vm.enable_dirty_ring(dirty_ring)
        vm.set_identity_map_addr(layout.IDENTITY_MAP_ADDRESS)
        vm.set_tss_addr(layout.TSS_ADDRESS)
        vm.create_irqchip()
        vm.create_pit2()
        for slot in memory.map.slots:
            vm.set_memory_region(slot.index, slot.guest_phys, slot.size, memory.address(slot.region) + slot.offset)
        made = tuple(vm.create_vcpu(index) for index in range(vcpus))
        for vcpu in made:
            vcpu.set_cpuid2(model.for_vcpu(vcpu.index, vcpus))
        seen = made[0].get_cpuid2()
    except BaseException:
        vm.close()
        raise
    return Board(vm=vm, vcpus=made, seen=seen)


def prepare(vcpus: Sequence[Vcpu], entries: Sequence[Entry | None]) -> None:
    """Give each vCPU the state that firmware would leave it in, and its entry."""
    for vcpu, entry in zip(vcpus, entries, strict=True):
        # Write-back memory by default, so that a kernel trusts its page attribute table; older KVMs refuse the first.
        vcpu.set_msrs([(_MSR_MISC_ENABLE, _FAST_STRING), (_MSR_MTRR_DEFAULT, _MTRR_WRITE_BACK)])
        if entry is not None:
            enter(vcpu, entry)
            vcpu.set_mp_state(MpState.RUNNABLE)


def _segment(*, selector: int, type_: int, long: bool = False, system: bool = False) -> KvmSegment:
    flat = not system
    return KvmSegment(
        base=0, limit=0xFFFF_FFFF if flat else 0x67, selector=selector, type=type_, present=1, dpl=0,
        db=int(flat and not long), s=int(flat), l=int(long), g=int(flat), avl=0, unusable=0,
    )  # fmt: skip


def enter(vcpu: Vcpu, entry: Entry, *, idt: int = 0, idt_limit: int = 0) -> None:
    """Set the registers that ``entry`` asks for."""
    long = entry.mode is Mode.LONG
    sregs: KvmSregs = vcpu.get_sregs()
    sregs.cs = _segment(selector=0x10, type_=_CODE, long=long)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = _segment(selector=0x18, type_=_DATA)
    sregs.tr = _segment(selector=0, type_=_TSS, system=True)
    sregs.gdt.base, sregs.gdt.limit = entry.gdt, entry.gdt_limit
    sregs.idt.base, sregs.idt.limit = idt, idt_limit
    sregs.cr0, sregs.cr4, sregs.efer = _CR0_PROTECTED, 0, 0
    if long:
        sregs.cr0 |= _CR0_PAGING
        sregs.cr4, sregs.efer, sregs.cr3 = _CR4_PAE, _EFER_LONG, entry.cr3
    vcpu.set_sregs(sregs)
    vcpu.set_regs(KvmRegs(rip=entry.rip, rsp=entry.rsp, rbx=entry.rbx, rsi=entry.rsi, rdi=entry.rdi, rflags=2))
