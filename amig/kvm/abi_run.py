"""``kvm_run``: the page that KVM and user space share for each vCPU (api.rst section 5)."""

from __future__ import annotations

import ctypes
import struct
from typing import Annotated

from .abi_base import KvmStruct, KvmUnion, kernel, u8, u16, u32, u64


@kernel(16)
class ExitIo(KvmStruct):
    """KVM_EXIT_IO; ``data_offset`` counts from the start of ``kvm_run``."""

    direction: u8
    size: u8
    port: u16
    count: u32
    data_offset: u64


@kernel(24)
class ExitMmio(KvmStruct):
    """KVM_EXIT_MMIO."""

    phys_addr: u64
    data: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 8]
    len: u32
    is_write: u8


@kernel(16)
class ExitFailEntry(KvmStruct):
    """KVM_EXIT_FAIL_ENTRY: the processor refused the vCPU's state."""

    hardware_entry_failure_reason: u64
    cpu: u32


@kernel(136)
class ExitInternal(KvmStruct):
    """KVM_EXIT_INTERNAL_ERROR."""

    suberror: u32
    ndata: u32
    data: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 16]


@kernel(32)
class ExitEmulationFailure(KvmStruct):
    """KVM_EXIT_INTERNAL_ERROR with suberror 1; the instruction bytes are valid if bit 0 of ``flags`` is set."""

    suberror: u32
    ndata: u32
    flags: u64
    insn_size: u8
    insn_bytes: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 15]


@kernel(136)
class ExitSystemEvent(KvmStruct):
    """KVM_EXIT_SYSTEM_EVENT."""

    type: u32
    ndata: u32
    data: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 16]


@kernel(256)
class ExitUnion(KvmUnion):
    """The part of ``kvm_run`` whose meaning depends on the exit reason."""

    hardware_exit_reason: u64
    io: ExitIo
    mmio: ExitMmio
    fail_entry: ExitFailEntry
    internal: ExitInternal
    emulation_failure: ExitEmulationFailure
    system_event: ExitSystemEvent
    padding: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 256]


@kernel(2352)
class KvmRun(KvmStruct):
    """``kvm_run``. ``immediate_exit`` may be written by any thread: the next KVM_RUN then ends with EINTR."""

    request_interrupt_window: u8
    immediate_exit: u8
    padding1: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 6]
    exit_reason: u32
    ready_for_interrupt_injection: u8
    if_flag: u8
    flags: u16
    cr8: u64
    apic_base: u64
    exit: ExitUnion
    kvm_valid_regs: u64
    kvm_dirty_regs: u64
    sync_regs: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 2048]


# The exit path runs once for every port access of the guest: `struct` reads all fields in one call there, which
# costs a tenth of as many ctypes attributes.
IMMEDIATE_EXIT_AT = 1
EXIT_REASON_AT = 8
EXIT_AT = 32
MMIO_DATA_AT = EXIT_AT + 8
EXIT_REASON = struct.Struct("<I")
IO_EXIT = struct.Struct("<BBHIQ")
"""direction, size, port, count, data_offset; unpacked at ``EXIT_AT``."""
MMIO_EXIT = struct.Struct("<QQIB")
"""phys_addr, data as a little-endian number, len, is_write; unpacked at ``EXIT_AT``."""
IO_OUT = 1


def _offset(structure: type[KvmStruct], field: str) -> int:
    offset: int = getattr(structure, field).offset
    return offset


if (
    _offset(KvmRun, "immediate_exit"),
    _offset(KvmRun, "exit_reason"),
    _offset(KvmRun, "exit"),
    _offset(KvmRun, "exit") + _offset(ExitMmio, "data"),
) != (IMMEDIATE_EXIT_AT, EXIT_REASON_AT, EXIT_AT, MMIO_DATA_AT):
    raise AssertionError("the offsets above do not fit kvm_run")
