"""Structures of the vCPU ioctls (``asm/kvm.h`` of x86-64)."""

from __future__ import annotations

import ctypes
from typing import Annotated

from .abi_base import KvmStruct, kernel, u8, u16, u32, u64


@kernel(144)
class KvmRegs(KvmStruct):
    """``kvm_regs`` (api.rst 4.11): general purpose registers."""

    rax: u64
    rbx: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    rsp: u64
    rbp: u64
    r8: u64
    r9: u64
    r10: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64
    r15: u64
    rip: u64
    rflags: u64


@kernel(24)
class KvmSegment(KvmStruct):
    """``kvm_segment``."""

    base: u64
    limit: u32
    selector: u16
    type: u8
    present: u8
    dpl: u8
    db: u8
    s: u8
    l: u8  # noqa: E741 - the kernel's name
    g: u8
    avl: u8
    unusable: u8
    padding: u8


@kernel(16)
class KvmDtable(KvmStruct):
    """``kvm_dtable``: GDT or IDT register."""

    base: u64
    limit: u16
    padding: Annotated[ctypes.Array[ctypes.c_uint16], ctypes.c_uint16 * 3]


@kernel(312)
class KvmSregs(KvmStruct):
    """``kvm_sregs`` (api.rst 4.13): segment, table and control registers, and the interrupt being injected."""

    cs: KvmSegment
    ds: KvmSegment
    es: KvmSegment
    fs: KvmSegment
    gs: KvmSegment
    ss: KvmSegment
    tr: KvmSegment
    ldt: KvmSegment
    gdt: KvmDtable
    idt: KvmDtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    interrupt_bitmap: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 4]


@kernel(320)
class KvmSregs2(KvmStruct):
    """``kvm_sregs2`` (api.rst 4.132): as `KvmSregs`, with the PDPTRs that PAE paging has loaded."""

    cs: KvmSegment
    ds: KvmSegment
    es: KvmSegment
    fs: KvmSegment
    gs: KvmSegment
    ss: KvmSegment
    tr: KvmSegment
    ldt: KvmSegment
    gdt: KvmDtable
    idt: KvmDtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    flags: u64
    pdptrs: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 4]


@kernel(416)
class KvmFpu(KvmStruct):
    """``kvm_fpu`` (api.rst 4.33): x87 and SSE state only; XSAVE holds all of it."""

    fpr: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 128]
    fcw: u16
    fsw: u16
    ftwx: u8
    pad1: u8
    last_opcode: u16
    last_ip: u64
    last_dp: u64
    xmm: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 256]
    mxcsr: u32
    pad2: u32


@kernel(4096)
class KvmXsave(KvmStruct):
    """``kvm_xsave`` (api.rst 4.42): the first 4096 bytes; KVM_GET_XSAVE2 may give more."""

    region: Annotated[ctypes.Array[ctypes.c_uint32], ctypes.c_uint32 * 1024]


@kernel(16)
class KvmXcr(KvmStruct):
    """``kvm_xcr``."""

    xcr: u32
    reserved: u32
    value: u64


@kernel(392)
class KvmXcrs(KvmStruct):
    """``kvm_xcrs`` (api.rst 4.44)."""

    nr_xcrs: u32
    flags: u32
    xcrs: Annotated[ctypes.Array[KvmXcr], KvmXcr * 16]
    padding: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 16]


@kernel(16)
class KvmMsrEntry(KvmStruct):
    """``kvm_msr_entry``."""

    index: u32
    reserved: u32
    data: u64


@kernel(8)
class KvmMsrs(KvmStruct):
    """``kvm_msrs`` without its entries (api.rst 4.18)."""

    nmsrs: u32
    pad: u32


@kernel(1024)
class KvmLapicState(KvmStruct):
    """``kvm_lapic_state`` (api.rst 4.57): the local APIC's register page."""

    regs: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 1024]


@kernel(128)
class KvmDebugregs(KvmStruct):
    """``kvm_debugregs`` (api.rst 4.33)."""

    db: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 4]
    dr6: u64
    dr7: u64
    flags: u64
    reserved: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 9]


@kernel(64)
class KvmVcpuEvents(KvmStruct):
    """``kvm_vcpu_events`` (api.rst 4.31): pending and injected exceptions, interrupts, NMI, SMI, flattened."""

    exception_injected: u8
    exception_nr: u8
    exception_has_error_code: u8
    exception_pending: u8
    exception_error_code: u32
    interrupt_injected: u8
    interrupt_nr: u8
    interrupt_soft: u8
    interrupt_shadow: u8
    nmi_injected: u8
    nmi_pending: u8
    nmi_masked: u8
    nmi_pad: u8
    sipi_vector: u32
    flags: u32
    smi_smm: u8
    smi_pending: u8
    smi_smm_inside_nmi: u8
    smi_latched_init: u8
    triple_fault_pending: u8
    reserved: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 26]
    exception_has_payload: u8
    exception_payload: u64


@kernel(4)
class KvmMpState(KvmStruct):
    """``kvm_mp_state`` (api.rst 4.38)."""

    mp_state: u32


@kernel(4)
class KvmSignalMask(KvmStruct):
    """``kvm_signal_mask`` without its set (api.rst 4.17)."""

    len: u32
