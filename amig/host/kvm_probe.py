"""What this KVM can do, asked of a VM made for the question.

Can it run an operating system's kernel? A few instructions say so before minutes are spent to find out.

A KVM without hardware virtualization beneath it interprets ring 0, a million instructions a second, and stops at those
its interpreter does not know. Linux comes to the first of them some minutes after its start.
"""

from __future__ import annotations

import struct

from amig.errors import BootError
from amig.host.boot import Entry, Mode
from amig.host.kvm_board import enter
from amig.host.memory import MemfdMemory
from amig.kvm.abi_numbers import ExitReason
from amig.kvm.system import Kvm
from amig.memory import PAGE_SIZE

_SIZE = 16 * PAGE_SIZE
_PML4, _PDPT, _PD, _GDT, _IDT, _DATA, _CODE, _STACK = (PAGE_SIZE * n for n in range(1, 9))
_PRESENT_WRITABLE, _LARGE = 0x3, 0x80
_BREAKPOINT = 3
_INTERRUPT_GATE = 0x8E
_PROGRAM = (
    ("lock cmpxchg16b [rsi]", bytes.fromhex("f0480fc70e")),  # Linux's memory allocator
    ("int3", b"\xcc"),  # how Linux patches its own code
)
_HLT = b"\xf4"
_TRIES = 100


def check_kernels_run(kvm: Kvm) -> None:
    """Raise `BootError`, naming the instruction, when this KVM can't run what every Linux kernel runs."""
    memory = MemfdMemory.create(_SIZE)
    try:
        _fill(memory)
        with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            vm.set_memory_region(0, 0, _SIZE, memory.address(0))
            vcpu.set_cpuid2(kvm.supported_cpuid())
            entry = Entry(mode=Mode.LONG, rip=_CODE, rsi=_DATA, rsp=_STACK + PAGE_SIZE, cr3=_PML4, gdt=_GDT,
                          gdt_limit=31)  # fmt: skip
            enter(vcpu, entry, idt=_IDT, idt_limit=16 * (_BREAKPOINT + 1) - 1)
            for _ in range(_TRIES):  # a signal may end a run before its time
                reason = vcpu.run()
                if reason is not None:
                    break

            if reason is ExitReason.INTERNAL_ERROR:
                raise BootError(
                    f"this KVM can't run a Linux kernel: it fails at the instruction {_named(vcpu.get_regs().rip)}; "
                    "it seems to be a nested KVM that interprets kernels instead of running them. Use an ordinary "
                    "Intel or AMD host, or one with nested virtualization in hardware; amig's own guest images run here"
                )
    finally:
        memory.close()


def check_dirty_ring(size: int) -> None:
    """Raise `KvmUnavailable` or `UsageError` where no guest can have a dirty ring of ``size`` bytes."""
    with Kvm.open() as kvm, kvm.create_vm() as vm:
        vm.enable_dirty_ring(size)


def _named(rip: int) -> str:
    at = _CODE
    for name, code in _PROGRAM:
        if at <= rip < at + len(code):
            return f"'{name}' ({code.hex(' ')})"
        at += len(code)
    return f"at {rip:#x}"


def _fill(memory: MemfdMemory) -> None:
    def put(address: int, *words: int) -> None:
        memory.write(address, struct.pack(f"<{len(words)}Q", *words))

    put(_PML4, _PDPT | _PRESENT_WRITABLE)
    put(_PDPT, _PD | _PRESENT_WRITABLE)
    put(_PD, _PRESENT_WRITABLE | _LARGE)
    put(_GDT, 0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
    handler = _CODE + 0x100
    memory.write(_IDT + 16 * _BREAKPOINT, struct.pack("<HHBBHQ", handler, 0x10, 0, _INTERRUPT_GATE, 0, 0))
    memory.write(_CODE, b"".join(code for _, code in _PROGRAM) + _HLT)
    memory.write(handler, _HLT)
