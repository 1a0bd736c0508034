"""How a vCPU ended: the reason, a text for a person, and the registers."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import AmigError, GuestError
from ..kvm.abi_numbers import ExitReason, InternalError
from ..kvm.abi_vcpu import KvmRegs, KvmSegment, KvmSregs
from ..kvm.vcpu import Vcpu

MemoryReader = Callable[[int, int], bytes | None]
"""``(guest_phys, size) -> bytes``, fewer or None where there is no memory."""

EMULATION_HINT = "this KVM can't emulate that instruction (nested software-MMU KVM?): use an ordinary Intel or AMD host"


class StopReason(enum.Enum):
    """Why a vCPU does not run any more."""

    REQUESTED = "requested"
    """A device was told by the guest to switch off or reset (`GuestStop`)."""
    HALTED = "halted"
    """HLT without in-kernel interrupt controllers: nothing could ever wake it."""
    SHUTDOWN = "shutdown"
    """A triple fault; some guests reboot this way."""
    SYSTEM_EVENT = "system-event"
    INTERNAL_ERROR = "internal-error"
    FAIL_ENTRY = "fail-entry"
    UNKNOWN_EXIT = "unknown-exit"
    HOST_ERROR = "host-error"
    """A handler of ours raised, or an ioctl failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """A vCPU's end. ``registers`` is a dump of several lines, empty if it could not be read."""

    index: int
    reason: StopReason
    text: str
    registers: str = ""
    cause: BaseException | None = None

    @property
    def in_order(self) -> bool:
        """Whether the guest ended by its own wish."""
        return self.reason in (StopReason.REQUESTED, StopReason.HALTED)

    def error(self) -> AmigError:
        """The same as an error to raise."""
        text = f"vCPU {self.index} stopped: {self.text}"
        error = GuestError(f"{text}\n{self.registers}" if self.registers else text)
        error.__cause__ = self.cause
        return error


def describe(vcpu: Vcpu, reason: ExitReason, read_memory: MemoryReader | None = None) -> Stopped:
    """The end that an exit of ``vcpu`` stands for, with registers. Never raises for what it can't find out."""
    exit_ = vcpu.kvm_run().exit
    kind = StopReason.UNKNOWN_EXIT
    match reason:
        case ExitReason.HLT:
            kind, text = StopReason.HALTED, "it executed HLT, and without interrupt controllers nothing can wake it"
        case ExitReason.SHUTDOWN:
            kind = StopReason.SHUTDOWN
            text = "triple fault: an exception could not be delivered (some guests reboot so)"
            if _was_reset(vcpu):
                text += "; this processor reset the registers before they could be read"
        case ExitReason.FAIL_ENTRY:
            number = exit_.fail_entry.hardware_entry_failure_reason
            kind = StopReason.FAIL_ENTRY
            text = f"the processor refused its state (hardware reason {number:#x}): registers were set wrongly"
        case ExitReason.SYSTEM_EVENT:
            kind, text = StopReason.SYSTEM_EVENT, f"system event {exit_.system_event.type}"
        case ExitReason.INTERNAL_ERROR:
            kind, text = StopReason.INTERNAL_ERROR, _internal_error(vcpu, read_memory)
        case _:
            text = f"KVM left the guest for a reason that amig does not handle ({vcpu.exit_number()}, {reason.name})"
    return Stopped(index=vcpu.index, reason=kind, text=text, registers=dump_registers(vcpu))


def _was_reset(vcpu: Vcpu) -> bool:
    """Whether the vCPU stands at the reset vector: kvm_amd resets it on a triple fault (APM vol. 2, 15.14.3)."""
    try:
        return vcpu.get_regs().rip == 0xFFF0
    except AmigError:
        return False


def _internal_error(vcpu: Vcpu, read_memory: MemoryReader | None) -> str:
    exit_ = vcpu.kvm_run().exit
    number = exit_.internal.suberror
    if number != InternalError.EMULATION:
        data = ", ".join(f"{word:#x}" for word in exit_.internal.data[: min(exit_.internal.ndata, 16)])
        names = {int(error): error.name.lower() for error in InternalError}
        return f"KVM internal error {number} ({names.get(number, 'unknown')}), data [{data}]"
    instruction = b""
    failure = exit_.emulation_failure
    if failure.ndata >= 3 and failure.flags & 1:
        instruction = bytes(failure.insn_bytes[: min(failure.insn_size, 15)])
    if not instruction and read_memory is not None:
        instruction = _bytes_at_rip(vcpu, read_memory)
    shown = f" [{instruction.hex(' ')}]" if instruction else ""
    return f"KVM internal error: emulation of an instruction failed{shown}; {EMULATION_HINT}"


def _bytes_at_rip(vcpu: Vcpu, read_memory: MemoryReader) -> bytes:
    try:
        sregs = vcpu.get_sregs()
        linear = (sregs.cs.base + vcpu.get_regs().rip) & (1 << 64) - 1
        physical = translate(linear, sregs, read_memory)
        if physical is None:
            return b""
        return (read_memory(physical, min(15, 4096 - physical % 4096)) or b"")[:15]
    except Exception:  # what we wanted to explain must not be hidden by an error in explaining it
        return b""


def translate(linear: int, sregs: KvmSregs, read_memory: MemoryReader) -> int | None:
    """The guest-physical address of ``linear``: a walk of 4- or 5-level long-mode tables, or itself without paging."""
    if not sregs.cr0 & 1 << 31:
        return linear
    if not sregs.efer & 1 << 10:
        return None  # 32-bit paging: only boot code uses it, and only for a moment
    table = sregs.cr3 & 0x000F_FFFF_FFFF_F000
    for level in range(5 if sregs.cr4 & 1 << 12 else 4, 0, -1):
        shift = 12 + 9 * (level - 1)
        raw = read_memory(table + 8 * (linear >> shift & 511), 8)
        if raw is None or len(raw) != 8:
            return None
        entry = int.from_bytes(raw, "little")
        if not entry & 1:
            return None
        table = entry & 0x000F_FFFF_FFFF_F000
        if level == 1 or (level <= 3 and entry & 1 << 7):
            inside = (1 << shift) - 1
            return table & ~inside | linear & inside
    return None


def dump_registers(vcpu: Vcpu) -> str:
    """All that one wants to see of a vCPU that died, in the manner of the kernel's oops; empty if it can't be read."""
    try:
        return format_registers(vcpu.get_regs(), vcpu.get_sregs())
    except AmigError:
        return ""


def format_registers(regs: KvmRegs, sregs: KvmSregs) -> str:
    """The registers as text."""
    names = ["rip", "rflags", "rsp", "rbp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))]
    cells = [f"{name:>6} {getattr(regs, name):016x}" for name in names]
    lines = [" ".join(cells[start : start + 4]) for start in range(0, len(cells), 4)]
    lines.append(" ".join(f"{name:>6} {getattr(sregs, name):016x}" for name in ("cr0", "cr2", "cr3", "cr4")))
    lines.append(f"  efer {sregs.efer:016x}")
    for name in ("cs", "ds", "ss", "tr"):
        segment: KvmSegment = getattr(sregs, name)
        lines.append(
            f"{name:>6} {segment.selector:04x} base {segment.base:016x} limit {segment.limit:08x} dpl {segment.dpl}"
        )
    return "\n".join(lines)
