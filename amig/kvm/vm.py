"""A virtual machine: memory slots, interrupt controllers, timer, clock, and new vCPUs."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from dataclasses import dataclass

from ..errors import KvmError, KvmUnavailable, UsageError
from .abi_numbers import (
    CAP_SINCE,
    DIRTY_LOG_PAGE_OFFSET,
    PIT_SPEAKER_DUMMY,
    Cap,
    Irqchip,
    ManualProtect,
    MemoryFlag,
    Request,
)
from .abi_vm import (
    KvmClockData,
    KvmEnableCap,
    KvmIrqchip,
    KvmIrqLevel,
    KvmPitConfig,
    KvmPitState2,
    KvmUserspaceMemoryRegion,
)
from .dirty_log import DirtyLogCalls
from .handle import Handle
from .ring import ENTRY, DirtyRing
from .vcpu import Vcpu

PAGE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One memory slot as it was registered; sizes and addresses in bytes."""

    slot: int
    guest_phys: int
    size: int
    host_addr: int
    flags: MemoryFlag

    @property
    def pages(self) -> int:
        """Number of 4 KiB pages."""
        return self.size // PAGE


class Vm(DirtyLogCalls, Handle):
    """A VM's descriptor. Closing it closes its vCPUs; the process's memory behind the slots is the caller's.

    Usable from any thread of the process that created it. The kernel serializes changes of slots and dirty-log calls.
    """

    def __init__(self, fd: int, *, vcpu_mmap_size: int, msr_indices: tuple[int, ...]) -> None:
        super().__init__(fd, "VM")
        self.vcpu_mmap_size = vcpu_mmap_size
        self.msr_indices = msr_indices
        """The MSRs that the kernel lists as a vCPU's state."""
        self.ring_bytes = 0
        """Size of each vCPU's dirty ring; 0 when dirty pages are logged by bitmap."""
        self.tsc_restored = False
        """Whether a vCPU's saved TSC has been set; the others then follow it (see ``snapshot``)."""
        self.has_irqchip = False
        self.has_pit = False
        self._regions: dict[int, Region] = {}
        self._vcpus: list[Vcpu] = []
        self._changing = threading.Lock()

    # memory

    @property
    def regions(self) -> dict[int, Region]:
        """The registered slots, by number (a copy)."""
        return dict(self._regions)

    def set_memory_region(
        self,
        slot: int,
        guest_phys: int,
        size: int,
        host_addr: int,
        *,
        log_dirty: bool = False,
        readonly: bool = False,
    ) -> None:
        """Register, change or (``size`` 0) delete a slot; bytes, multiples of 4 KiB (api.rst 4.35).

        Of an existing slot only ``log_dirty`` may change. With "initially set", switching it on marks every page.
        """
        flags = MemoryFlag(0)
        if log_dirty:
            flags |= MemoryFlag.LOG_DIRTY_PAGES
        if readonly:
            flags |= MemoryFlag.READONLY
        region = Region(slot=slot, guest_phys=guest_phys, size=size, host_addr=host_addr, flags=flags)
        argument = KvmUserspaceMemoryRegion(
            slot=slot, flags=int(flags), guest_phys_addr=guest_phys, memory_size=size, userspace_addr=host_addr
        )
        with self._changing:
            self._set(Request.KVM_SET_USER_MEMORY_REGION, argument)
            if size:
                self._regions[slot] = region
            else:
                self._regions.pop(slot, None)

    def set_dirty_logging(self, slot: int, on: bool) -> None:
        """Switch the dirty log of a registered slot on or off."""
        region = self.region(slot)
        self.set_memory_region(
            slot,
            region.guest_phys,
            region.size,
            region.host_addr,
            log_dirty=on,
            readonly=bool(region.flags & MemoryFlag.READONLY),
        )

    def delete_memory_region(self, slot: int) -> None:
        """Delete a slot; its dirty bits are gone with it."""
        self.set_memory_region(slot, 0, 0, 0)

    def region(self, slot: int) -> Region:
        """The slot as registered. Raises UsageError if there is none."""
        try:
            return self._regions[slot]
        except KeyError:
            raise UsageError(f"memory slot {slot} does not exist") from None

    # capabilities

    def check_extension(self, cap: Cap) -> int:
        """What the kernel answers for ``cap`` on this VM (0: not there)."""
        return self._call(Request.KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: Cap, *args: int) -> None:
        """KVM_ENABLE_CAP with up to four arguments (api.rst 4.37)."""
        value = KvmEnableCap(cap=int(cap))
        for index, argument in enumerate(args):
            value.args[index] = argument
        self._set(Request.KVM_ENABLE_CAP, value)

    def enable_manual_protect(self, *, initially_set: bool) -> ManualProtect:
        """Make KVM_GET_DIRTY_LOG leave pages writable until they are cleared (api.rst 7.18, Linux 5.2).

        Returns what is in force: NONE where the kernel lacks it (reading then clears at once), and ENABLE alone where
        "initially set" was asked for but is not there (Linux 5.7). To be called while no slot is logged.
        """
        offered = ManualProtect(self.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2) & 3)
        wanted = ManualProtect.ENABLE | (ManualProtect.INITIALLY_SET if initially_set else ManualProtect.NONE)
        enabled = offered & wanted
        if not enabled & ManualProtect.ENABLE:
            return ManualProtect.NONE
        self.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, int(enabled))
        return enabled

    def disable_manual_protect(self) -> None:
        """Back to the log that reading clears."""
        self.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, 0)

    def enable_dirty_ring(self, size: int) -> None:
        """Log dirty pages in a ring of ``size`` bytes (a power of two) for each vCPU; before the first vCPU.

        KVM_GET_DIRTY_LOG is then refused by the kernel. Raises KvmUnavailable below Linux 5.11, UsageError for a size
        that this kernel does not take.
        """
        cap = Cap.DIRTY_LOG_RING_ACQ_REL
        most = self.check_extension(cap)
        if not most:
            cap = Cap.DIRTY_LOG_RING
            most = self.check_extension(cap)
        if not most:
            text = f"this KVM has no dirty ring (there since Linux {CAP_SINCE[Cap.DIRTY_LOG_RING]}): use the bitmap"
            raise KvmUnavailable(text, request=Request.KVM_CHECK_EXTENSION.name)
        if size < PAGE or size & (size - 1) or size > most:
            raise UsageError(f"a dirty ring takes a power of two from {PAGE} to {most} bytes here, not {size}")
        if self._vcpus:
            raise UsageError("the dirty ring must be chosen before the first vCPU is created")
        try:
            self.enable_cap(cap, size)
        except KvmError as error:
            if error.errno != errno.EINVAL:
                raise
            # Entries are kept in reserve for those that a processor logs by itself before it can be stopped.
            text = f"this processor needs a larger dirty ring than {size} bytes: try {16 * PAGE}"
            raise UsageError(text) from error
        self.ring_bytes = size

    def reset_dirty_rings(self) -> int:
        """Protect the pages that were harvested from all rings again; returns how many entries (api.rst 8.29)."""
        return self._call(Request.KVM_RESET_DIRTY_RINGS)

    # board

    def set_tss_addr(self, address: int) -> None:
        """Three guest pages below 4 GiB for KVM's use on Intel (api.rst 4.36); before the first vCPU."""
        self._call(Request.KVM_SET_TSS_ADDR, address)

    def set_identity_map_addr(self, address: int) -> None:
        """One guest page below 4 GiB for KVM's use on Intel (api.rst 4.41); before the first vCPU."""
        value = ctypes.c_uint64(address)
        self._call(Request.KVM_SET_IDENTITY_MAP_ADDR, ctypes.addressof(value))

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and local APICs in the kernel; before the first vCPU (api.rst 4.24)."""
        self._call(Request.KVM_CREATE_IRQCHIP)
        self.has_irqchip = True

    def create_pit2(self, *, speaker: bool = True) -> None:
        """The i8254 timer in the kernel, after `create_irqchip`; ``speaker`` also answers port 0x61 (api.rst 4.71)."""
        if not self.has_irqchip:  # not every kernel checks
            raise UsageError("create the interrupt controllers before the timer")
        self._set(Request.KVM_CREATE_PIT2, KvmPitConfig(flags=PIT_SPEAKER_DUMMY if speaker else 0))
        self.has_pit = True

    def irq_line(self, gsi: int, level: bool) -> None:
        """Raise or lower an input of the interrupt controllers (api.rst 4.25)."""
        self._set(Request.KVM_IRQ_LINE, KvmIrqLevel(irq=gsi, level=int(level)))

    def get_irqchip(self, chip: Irqchip) -> bytes:
        """The 512 bytes of a controller's state (api.rst 4.26)."""
        value = KvmIrqchip(chip_id=int(chip))
        self._set(Request.KVM_GET_IRQCHIP, value)
        return bytes(value.chip)

    def set_irqchip(self, chip: Irqchip, state: bytes) -> None:
        """Give a controller the state that `get_irqchip` returned."""
        if len(state) != 512:
            raise ValueError(f"an interrupt controller's state has 512 bytes, not {len(state)}")
        value = KvmIrqchip(chip_id=int(chip))
        value.chip[:] = list(state)
        self._set(Request.KVM_SET_IRQCHIP, value)

    def get_pit2(self) -> KvmPitState2:
        """The timer's state (api.rst 4.72)."""
        return self._get(Request.KVM_GET_PIT2, KvmPitState2)

    def set_pit2(self, state: KvmPitState2) -> None:
        """Set the timer's state (api.rst 4.72)."""
        self._set(Request.KVM_SET_PIT2, state)

    def get_clock(self) -> KvmClockData:
        """The KVM clock, in nanoseconds (api.rst 4.29)."""
        return self._get(Request.KVM_GET_CLOCK, KvmClockData)

    def set_clock(self, nanoseconds: int) -> None:
        """Let the KVM clock go on from ``nanoseconds`` (api.rst 4.30)."""
        self._set(Request.KVM_SET_CLOCK, KvmClockData(clock=nanoseconds))

    # vCPUs

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """The vCPUs created and not closed, in order of creation."""
        return tuple(vcpu for vcpu in self._vcpus if not vcpu.closed)

    def create_vcpu(self, index: int) -> Vcpu:
        """A vCPU whose APIC id is ``index``. With in-kernel controllers all but 0 wait for their start-up signal."""
        with self._changing:
            fd = self._call(Request.KVM_CREATE_VCPU, index)
            try:
                run = mmap.mmap(fd, self.vcpu_mmap_size)
                ring = None
                if self.ring_bytes:
                    ring = DirtyRing(mmap.mmap(fd, self.ring_bytes, offset=DIRTY_LOG_PAGE_OFFSET * PAGE))
            except OSError as error:
                os.close(fd)
                text = f"can't map vCPU {index} ({error.strerror}): free some memory"
                raise KvmError(text, request="mmap", errno=error.errno or errno.ENOMEM) from error
            xsave = max(self.check_extension(Cap.XSAVE2), PAGE)
            vcpu = Vcpu(fd, index, run=run, ring=ring, xsave_size=xsave, sregs2=bool(self.check_extension(Cap.SREGS2)))
            self._vcpus.append(vcpu)
            return vcpu

    def close(self) -> None:
        """Close the vCPUs, then the VM. Raises KvmError if a vCPU runs, after closing the rest."""
        failure: KvmError | None = None
        for vcpu in self._vcpus:
            try:
                vcpu.close()
            except KvmError as error:
                failure = error
        super().close()
        if failure:
            raise failure


__all__ = ["ENTRY", "PAGE", "Region", "Vm"]
