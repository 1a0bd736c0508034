"""Structures of the system and VM ioctls (``linux/kvm.h`` and ``asm/kvm.h`` of x86-64)."""

from __future__ import annotations

import ctypes
from typing import Annotated

from .abi_base import KvmStruct, kernel, s64, u8, u16, u32, u64


@kernel(32)
class KvmUserspaceMemoryRegion(KvmStruct):
    """``kvm_userspace_memory_region`` (api.rst 4.35): one memory slot; size 0 deletes it."""

    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


@kernel(104)
class KvmEnableCap(KvmStruct):
    """``kvm_enable_cap`` (api.rst 4.37)."""

    cap: u32
    flags: u32
    args: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 4]
    pad: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 64]


@kernel(8)
class KvmIrqLevel(KvmStruct):
    """``kvm_irq_level`` (api.rst 4.25)."""

    irq: u32
    level: u32


@kernel(520)
class KvmIrqchip(KvmStruct):
    """``kvm_irqchip`` (api.rst 4.26): the state of PIC 0 or 1 or of the IOAPIC."""

    chip_id: u32
    pad: u32
    chip: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 512]


@kernel(64)
class KvmPitConfig(KvmStruct):
    """``kvm_pit_config`` (api.rst 4.71)."""

    flags: u32
    pad: Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 15]


@kernel(24)
class KvmPitChannelState(KvmStruct):
    """``kvm_pit_channel_state``; ``count_load_time`` is in the source's CLOCK_BOOTTIME nanoseconds."""

    count: u32
    latched_count: u16
    count_latched: u8
    status_latched: u8
    status: u8
    read_state: u8
    write_state: u8
    write_latch: u8
    rw_mode: u8
    mode: u8
    bcd: u8
    gate: u8
    count_load_time: s64


@kernel(112)
class KvmPitState2(KvmStruct):
    """``kvm_pit_state2`` (api.rst 4.72)."""

    channels: Annotated[ctypes.Array[KvmPitChannelState], KvmPitChannelState * 3]
    flags: u32
    reserved: Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 9]


@kernel(48)
class KvmClockData(KvmStruct):
    """``kvm_clock_data`` (api.rst 4.29): the guest's KVM clock in nanoseconds."""

    clock: u64
    flags: u32
    pad0: u32
    realtime: u64
    host_tsc: u64
    pad: Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 4]


@kernel(16)
class KvmDirtyLog(KvmStruct):
    """``kvm_dirty_log`` (api.rst 4.8); ``dirty_bitmap`` is a user pointer."""

    slot: u32
    padding: u32
    dirty_bitmap: u64


@kernel(24)
class KvmClearDirtyLog(KvmStruct):
    """``kvm_clear_dirty_log`` (api.rst 4.117); ``dirty_bitmap`` is a user pointer."""

    slot: u32
    num_pages: u32
    first_page: u64
    dirty_bitmap: u64


@kernel(16)
class KvmDirtyGfn(KvmStruct):
    """``kvm_dirty_gfn`` (api.rst 8.29): one entry of a vCPU's dirty ring."""

    flags: u32
    slot: u32
    offset: u64


@kernel(4)
class KvmMsrList(KvmStruct):
    """``kvm_msr_list`` without its entries (api.rst 4.3)."""

    nmsrs: u32


@kernel(8)
class KvmCpuid2(KvmStruct):
    """``kvm_cpuid2`` without its entries (api.rst 4.46)."""

    nent: u32
    padding: u32


@kernel(40)
class KvmCpuidEntry2(KvmStruct):
    """``kvm_cpuid_entry2``."""

    function: u32
    index: u32
    flags: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 3]
