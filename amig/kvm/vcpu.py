"""A virtual processor: run it, read and write its registers."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterable, Sequence

from ..errors import KvmError, UsageError
from .abi_numbers import ExitReason, MpState, Request
from .abi_run import EXIT_REASON, EXIT_REASON_AT, IMMEDIATE_EXIT_AT, KvmRun
from .abi_vcpu import (
    KvmDebugregs,
    KvmFpu,
    KvmLapicState,
    KvmMpState,
    KvmRegs,
    KvmSregs,
    KvmSregs2,
    KvmVcpuEvents,
    KvmXcrs,
)
from .cpuid import CpuidEntry, pack_cpuid, unpack_cpuid
from .handle import Handle
from .ioctl import run as kvm_run
from .ring import DirtyRing

_MSR = struct.Struct("<IIQ")
_MSR_BATCH = 255  # the kernel takes fewer than MAX_IO_MSRS, which is 256
_REASONS: dict[int, ExitReason] = {int(reason): reason for reason in ExitReason}


class Vcpu(Handle):
    """A vCPU's descriptor and its ``kvm_run`` page. Use `Vm.create_vcpu`.

    One thread runs it; the other calls may come from any thread and wait in the kernel until KVM_RUN has returned,
    so pause the vCPU first. ``run_page`` and ``immediate_exit`` may be used by any thread at any time.
    """

    def __init__(
        self, fd: int, index: int, *, run: mmap.mmap, ring: DirtyRing | None, xsave_size: int, sregs2: bool
    ) -> None:
        super().__init__(fd, f"vCPU {index}")
        self.index = index
        """Its number in the VM and its APIC id."""
        self.run_page = run
        """The shared ``kvm_run`` page as a buffer, for `struct` (see ``abi_run``)."""
        self.dirty_ring = ring
        """Its dirty ring, if the VM logs by ring."""
        self.xsave_size = xsave_size
        """Bytes that XSAVE state takes on this VM (KVM_CAP_XSAVE2; 4096 or more)."""
        self.has_sregs2 = sregs2
        self._running = False
        self._cpuid: tuple[CpuidEntry, ...] = ()

    # running

    def run(self) -> ExitReason | None:
        """KVM_RUN: enter the guest until it needs something; None if a signal or ``immediate_exit`` ended it.

        The exit's particulars are in ``run_page`` (or ``kvm_run()``). Entering again completes a port or MMIO exit.
        Raises KvmError. Releases the GIL while the guest runs.
        """
        self._running = True  # before the descriptor is read: close() sets the two the other way round
        try:
            fd = self._fd
            if fd < 0:
                raise self._closed_error("KVM_RUN")
            if not kvm_run(fd):
                return None
            number = EXIT_REASON.unpack_from(self.run_page, EXIT_REASON_AT)[0]
            return _REASONS.get(number, ExitReason.UNKNOWN)
        finally:
            self._running = False

    def exit_number(self) -> int:
        """The kernel's number of the last exit, also where `ExitReason` has no name for it."""
        number: int = EXIT_REASON.unpack_from(self.run_page, EXIT_REASON_AT)[0]
        return number

    def kvm_run(self) -> KvmRun:
        """A copy of ``kvm_run``, fields by name."""
        return KvmRun.from_buffer_copy(self.run_page)

    def set_immediate_exit(self, on: bool) -> None:
        """Make the next KVM_RUN (not one that runs now) complete what is pending and end with EINTR."""
        self.run_page[IMMEDIATE_EXIT_AT] = int(on)

    def set_signal_mask(self, blocked: Iterable[int]) -> None:
        """The signals to be blocked while KVM_RUN runs, instead of the thread's own mask (api.rst 4.17).

        A signal that the thread blocks, but this mask does not, ends KVM_RUN with EINTR and stays pending.
        """
        mask = 0
        for number in blocked:
            mask |= 1 << (number - 1)
        buffer = ctypes.create_string_buffer(struct.pack("<IQ", 8, mask), 12)
        self._call(Request.KVM_SET_SIGNAL_MASK, ctypes.addressof(buffer))

    # registers

    def get_regs(self) -> KvmRegs:
        """General purpose registers (api.rst 4.11)."""
        return self._get(Request.KVM_GET_REGS, KvmRegs)

    def set_regs(self, regs: KvmRegs) -> None:
        """Set the general purpose registers; drops a pending exception (api.rst 4.12)."""
        self._set(Request.KVM_SET_REGS, regs)

    def get_sregs(self) -> KvmSregs:
        """Segment and control registers (api.rst 4.13)."""
        return self._get(Request.KVM_GET_SREGS, KvmSregs)

    def set_sregs(self, sregs: KvmSregs) -> None:
        """Set segment and control registers (api.rst 4.14)."""
        self._set(Request.KVM_SET_SREGS, sregs)

    def get_sregs2(self) -> KvmSregs2:
        """As `get_sregs`, with the PDPTRs (api.rst 4.132, Linux 5.14)."""
        return self._get(Request.KVM_GET_SREGS2, KvmSregs2)

    def set_sregs2(self, sregs: KvmSregs2) -> None:
        """Set what `get_sregs2` returned."""
        self._set(Request.KVM_SET_SREGS2, sregs)

    def get_fpu(self) -> KvmFpu:
        """X87 and SSE registers (api.rst 4.33)."""
        return self._get(Request.KVM_GET_FPU, KvmFpu)

    def set_fpu(self, fpu: KvmFpu) -> None:
        """Set the x87 and SSE registers."""
        self._set(Request.KVM_SET_FPU, fpu)

    def get_xsave(self) -> bytes:
        """All extended state, ``xsave_size`` bytes (KVM_GET_XSAVE, or KVM_GET_XSAVE2 if that is more than 4096)."""
        buffer = ctypes.create_string_buffer(self.xsave_size)
        request = Request.KVM_GET_XSAVE2 if self.xsave_size > 4096 else Request.KVM_GET_XSAVE
        self._call(request, ctypes.addressof(buffer))
        return buffer.raw

    def set_xsave(self, state: bytes) -> None:
        """Set what `get_xsave` returned. Raises UsageError if it is more than this VM holds (a missing feature)."""
        if len(state) > self.xsave_size:
            raise UsageError(f"the extended state has {len(state)} bytes, this host takes {self.xsave_size}")
        buffer = ctypes.create_string_buffer(state, self.xsave_size)  # the kernel reads xsave_size bytes
        self._call(Request.KVM_SET_XSAVE, ctypes.addressof(buffer))

    def get_xcrs(self) -> KvmXcrs:
        """Extended control registers (api.rst 4.44)."""
        return self._get(Request.KVM_GET_XCRS, KvmXcrs)

    def set_xcrs(self, xcrs: KvmXcrs) -> None:
        """Set the extended control registers."""
        self._set(Request.KVM_SET_XCRS, xcrs)

    def get_debugregs(self) -> KvmDebugregs:
        """Debug registers (api.rst 4.33)."""
        return self._get(Request.KVM_GET_DEBUGREGS, KvmDebugregs)

    def set_debugregs(self, debugregs: KvmDebugregs) -> None:
        """Set the debug registers."""
        self._set(Request.KVM_SET_DEBUGREGS, debugregs)

    def get_lapic(self) -> KvmLapicState:
        """The local APIC (api.rst 4.57); needs in-kernel controllers."""
        return self._get(Request.KVM_GET_LAPIC, KvmLapicState)

    def set_lapic(self, lapic: KvmLapicState) -> None:
        """Set the local APIC; after the special registers (APIC base), before the MSRs (TSC deadline)."""
        self._set(Request.KVM_SET_LAPIC, lapic)

    def get_vcpu_events(self) -> KvmVcpuEvents:
        """Pending and injected events (api.rst 4.31); reading may change other state, so read it first."""
        return self._get(Request.KVM_GET_VCPU_EVENTS, KvmVcpuEvents)

    def set_vcpu_events(self, events: KvmVcpuEvents) -> None:
        """Set pending and injected events; last of all."""
        self._set(Request.KVM_SET_VCPU_EVENTS, events)

    def get_mp_state(self) -> MpState:
        """Whether it runs, halts or waits to be started (api.rst 4.38)."""
        return MpState(self._get(Request.KVM_GET_MP_STATE, KvmMpState).mp_state)

    def set_mp_state(self, state: MpState) -> None:
        """Let it run, halt or wait to be started."""
        self._set(Request.KVM_SET_MP_STATE, KvmMpState(mp_state=int(state)))

    # MSRs

    def get_msrs(self, indices: Sequence[int]) -> tuple[dict[int, int], list[int]]:
        """Read MSRs in batches: values by index, and the indices that this vCPU can't read (api.rst 4.18)."""
        values: dict[int, int] = {}
        failed: list[int] = []
        position = 0
        while position < len(indices):
            batch = indices[position : position + _MSR_BATCH]
            buffer = _msr_buffer((index, 0) for index in batch)
            done = self._call(Request.KVM_GET_MSRS, ctypes.addressof(buffer))
            for entry in range(done):
                index, _, data = _MSR.unpack_from(buffer, 8 + 16 * entry)
                values[index] = data
            position += done
            if done < len(batch):
                failed.append(batch[done])
                position += 1
        return values, failed

    def set_msrs(self, values: Iterable[tuple[int, int]]) -> list[int]:
        """Write (index, value) pairs in the order given; returns the indices that were refused (api.rst 4.19)."""
        pairs = list(values)
        failed: list[int] = []
        position = 0
        while position < len(pairs):
            batch = pairs[position : position + _MSR_BATCH]
            buffer = _msr_buffer(batch)
            done = self._call(Request.KVM_SET_MSRS, ctypes.addressof(buffer))
            position += done
            if done < len(batch):
                failed.append(batch[done][0])
                position += 1
        return failed

    # CPUID and time

    def get_cpuid2(self) -> tuple[CpuidEntry, ...]:
        """The CPUID entries that were set (api.rst 4.86)."""
        buffer = ctypes.create_string_buffer(pack_cpuid((), room=256))
        self._call(Request.KVM_GET_CPUID2, ctypes.addressof(buffer))
        return unpack_cpuid(buffer.raw)

    def set_cpuid2(self, entries: Sequence[CpuidEntry]) -> None:
        """Set what CPUID answers; before the first run (api.rst 4.46)."""
        buffer = ctypes.create_string_buffer(pack_cpuid(entries))
        self._call(Request.KVM_SET_CPUID2, ctypes.addressof(buffer))
        self._cpuid = tuple(entries)

    @property
    def cpuid(self) -> tuple[CpuidEntry, ...]:
        """The CPUID entries as they were set, which is what moves with the guest; as KVM has them if none were set.

        KVM itself answers with bits of the moment (OSXSAVE) or, where it can't intercept CPUID, with the host's.
        """
        return self._cpuid or self.get_cpuid2()

    def get_tsc_khz(self) -> int:
        """The guest's TSC frequency in kHz (api.rst 4.56)."""
        return self._call(Request.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the guest's TSC frequency; before the TSC is written (api.rst 4.55)."""
        self._call(Request.KVM_SET_TSC_KHZ, khz)

    def kvmclock_ctrl(self) -> bool:
        """Tell the guest's watchdogs that it was paused (api.rst 4.76); False if it uses no KVM clock."""
        try:
            self._call(Request.KVM_KVMCLOCK_CTRL)
        except KvmError:
            return False
        return True

    def close(self) -> None:
        """Close it, once calls in flight have returned. Raises KvmError while its thread is inside KVM_RUN."""
        super().close()
        if self.dirty_ring:
            self.dirty_ring.close()
        self.run_page.close()

    def _check_close(self) -> None:
        if self._running:
            raise KvmError(f"{self._what} runs: stop its thread before closing it", request="close")


def _msr_buffer(pairs: Iterable[tuple[int, int]]) -> ctypes.Array[ctypes.c_char]:
    body = b"".join(_MSR.pack(index, 0, value) for index, value in pairs)
    return ctypes.create_string_buffer(struct.pack("<II", len(body) // 16, 0) + body, 8 + len(body))
