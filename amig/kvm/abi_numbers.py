"""Numbers of the KVM ABI: ioctl requests, capabilities, exit reasons, MSRs (``linux/kvm.h``)."""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag, unique

from . import abi_vcpu as v
from . import abi_vm as m
from .abi_base import KvmStruct

KVM_API_VERSION = 12
KVMIO = 0xAE


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | KVMIO << 8 | number


def _size(argument: type[KvmStruct] | type[ctypes._SimpleCData[int]]) -> int:
    return ctypes.sizeof(argument)


def _io(number: int) -> int:
    return _ioc(0, number, 0)


def _iow(number: int, argument: type[KvmStruct] | type[ctypes._SimpleCData[int]]) -> int:
    return _ioc(1, number, _size(argument))


def _ior(number: int, argument: type[KvmStruct] | type[ctypes._SimpleCData[int]]) -> int:
    return _ioc(2, number, _size(argument))


def _iowr(number: int, argument: type[KvmStruct] | type[ctypes._SimpleCData[int]]) -> int:
    return _ioc(3, number, _size(argument))


@unique
class Request(IntEnum):
    """The ioctls that amig uses, by the kernel's names, so that an error can name the one that failed."""

    # /dev/kvm
    KVM_GET_API_VERSION = _io(0x00)
    KVM_CREATE_VM = _io(0x01)
    KVM_GET_MSR_INDEX_LIST = _iowr(0x02, m.KvmMsrList)
    KVM_CHECK_EXTENSION = _io(0x03)
    KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
    KVM_GET_SUPPORTED_CPUID = _iowr(0x05, m.KvmCpuid2)
    KVM_GET_MSR_FEATURE_INDEX_LIST = _iowr(0x0A, m.KvmMsrList)
    # a VM
    KVM_CREATE_VCPU = _io(0x41)
    KVM_GET_DIRTY_LOG = _iow(0x42, m.KvmDirtyLog)
    KVM_SET_USER_MEMORY_REGION = _iow(0x46, m.KvmUserspaceMemoryRegion)
    KVM_SET_TSS_ADDR = _io(0x47)
    KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, ctypes.c_uint64)
    KVM_CREATE_IRQCHIP = _io(0x60)
    KVM_IRQ_LINE = _iow(0x61, m.KvmIrqLevel)
    KVM_GET_IRQCHIP = _iowr(0x62, m.KvmIrqchip)
    KVM_SET_IRQCHIP = _ior(0x63, m.KvmIrqchip)  # the kernel's header has _IOR here, by mistake and for ever
    KVM_CREATE_PIT2 = _iow(0x77, m.KvmPitConfig)
    KVM_SET_CLOCK = _iow(0x7B, m.KvmClockData)
    KVM_GET_CLOCK = _ior(0x7C, m.KvmClockData)
    KVM_GET_PIT2 = _ior(0x9F, m.KvmPitState2)
    KVM_SET_PIT2 = _iow(0xA0, m.KvmPitState2)
    KVM_SET_TSC_KHZ = _io(0xA2)  # on a vCPU too
    KVM_GET_TSC_KHZ = _io(0xA3)  # on a vCPU too
    KVM_ENABLE_CAP = _iow(0xA3, m.KvmEnableCap)
    KVM_CLEAR_DIRTY_LOG = _iowr(0xC0, m.KvmClearDirtyLog)
    KVM_RESET_DIRTY_RINGS = _io(0xC7)
    # a vCPU
    KVM_RUN = _io(0x80)
    KVM_GET_REGS = _ior(0x81, v.KvmRegs)
    KVM_SET_REGS = _iow(0x82, v.KvmRegs)
    KVM_GET_SREGS = _ior(0x83, v.KvmSregs)
    KVM_SET_SREGS = _iow(0x84, v.KvmSregs)
    KVM_GET_MSRS = _iowr(0x88, v.KvmMsrs)
    KVM_SET_MSRS = _iow(0x89, v.KvmMsrs)
    KVM_SET_SIGNAL_MASK = _iow(0x8B, v.KvmSignalMask)
    KVM_GET_FPU = _ior(0x8C, v.KvmFpu)
    KVM_SET_FPU = _iow(0x8D, v.KvmFpu)
    KVM_GET_LAPIC = _ior(0x8E, v.KvmLapicState)
    KVM_SET_LAPIC = _iow(0x8F, v.KvmLapicState)
    KVM_SET_CPUID2 = _iow(0x90, m.KvmCpuid2)
    KVM_GET_CPUID2 = _iowr(0x91, m.KvmCpuid2)
    KVM_GET_MP_STATE = _ior(0x98, v.KvmMpState)
    KVM_SET_MP_STATE = _iow(0x99, v.KvmMpState)
    KVM_GET_VCPU_EVENTS = _ior(0x9F, v.KvmVcpuEvents)
    KVM_SET_VCPU_EVENTS = _iow(0xA0, v.KvmVcpuEvents)
    KVM_GET_DEBUGREGS = _ior(0xA1, v.KvmDebugregs)
    KVM_SET_DEBUGREGS = _iow(0xA2, v.KvmDebugregs)
    KVM_GET_XSAVE = _ior(0xA4, v.KvmXsave)
    KVM_SET_XSAVE = _iow(0xA5, v.KvmXsave)
    KVM_GET_XCRS = _ior(0xA6, v.KvmXcrs)
    KVM_SET_XCRS = _iow(0xA7, v.KvmXcrs)
    KVM_KVMCLOCK_CTRL = _io(0xAD)
    KVM_GET_SREGS2 = _ior(0xCC, v.KvmSregs2)
    KVM_SET_SREGS2 = _iow(0xCD, v.KvmSregs2)
    KVM_GET_XSAVE2 = _ior(0xCF, v.KvmXsave)


@unique
class Cap(IntEnum):
    """Capabilities (``KVM_CAP_*``)."""

    IRQCHIP = 0
    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    EXT_CPUID = 7
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    SYNC_MMU = 16
    PIT2 = 33
    PIT_STATE2 = 35
    SET_IDENTITY_MAP_ADDR = 37
    ADJUST_CLOCK = 39
    VCPU_EVENTS = 41
    DEBUGREGS = 50
    XSAVE = 55
    XCRS = 56
    TSC_CONTROL = 60
    GET_TSC_KHZ = 61
    MAX_VCPUS = 66
    TSC_DEADLINE_TIMER = 72
    SYNC_REGS = 74
    KVMCLOCK_CTRL = 76
    READONLY_MEM = 81
    ENABLE_CAP_VM = 98
    MAX_VCPU_ID = 128
    IMMEDIATE_EXIT = 136
    GET_MSR_FEATURES = 153
    EXCEPTION_PAYLOAD = 164
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    DIRTY_LOG_RING = 192
    SREGS2 = 200
    XSAVE2 = 208
    DIRTY_LOG_RING_ACQ_REL = 223


CAP_SINCE: dict[Cap, str] = {
    Cap.TSC_DEADLINE_TIMER: "3.3",
    Cap.KVMCLOCK_CTRL: "3.5",
    Cap.READONLY_MEM: "3.7",
    Cap.ENABLE_CAP_VM: "3.14",
    Cap.IMMEDIATE_EXIT: "4.11",
    Cap.GET_MSR_FEATURES: "4.17",
    Cap.SYNC_REGS: "4.17",
    Cap.EXCEPTION_PAYLOAD: "4.20",
    Cap.MANUAL_DIRTY_LOG_PROTECT2: "5.2",
    Cap.DIRTY_LOG_RING: "5.11",
    Cap.SREGS2: "5.14",
    Cap.XSAVE2: "5.17",
    Cap.DIRTY_LOG_RING_ACQ_REL: "6.1",
}
"""The kernel that first had a capability; those not named are older than 3.0."""


@unique
class ExitReason(IntEnum):
    """Why KVM_RUN returned (``KVM_EXIT_*``)."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    HYPERV = 27
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    X86_BUS_LOCK = 33
    XEN = 34
    NOTIFY = 37
    MEMORY_FAULT = 39


class InternalError(IntEnum):
    """Suberrors of KVM_EXIT_INTERNAL_ERROR."""

    EMULATION = 1
    SIMUL_EX = 2
    DELIVERY_EV = 3
    UNEXPECTED_EXIT_REASON = 4


class MpState(IntEnum):
    """``KVM_MP_STATE_*`` of x86."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4


class MemoryFlag(IntFlag):
    """Flags of a memory slot."""

    LOG_DIRTY_PAGES = 1
    READONLY = 2


class ManualProtect(IntFlag):
    """What KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 offers and was told to do."""

    NONE = 0
    ENABLE = 1
    INITIALLY_SET = 2


class Irqchip(IntEnum):
    """``KVM_IRQCHIP_*``."""

    PIC_MASTER = 0
    PIC_SLAVE = 1
    IOAPIC = 2


PIT_SPEAKER_DUMMY = 1
VCPUEVENT_VALID_PAYLOAD = 0x10
DIRTY_LOG_PAGE_OFFSET = 64
DIRTY_GFN_DIRTY = 1
DIRTY_GFN_RESET = 2
CPUID_SIGNIFICANT_INDEX = 1

MSR_IA32_TSC = 0x10
MSR_IA32_TSC_ADJUST = 0x3B
MSR_IA32_TSC_DEADLINE = 0x6E0
