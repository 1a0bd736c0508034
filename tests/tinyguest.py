"""The smallest guest there is: a page of real-mode code in 1 MiB of memory, for tests of KVM itself."""

from __future__ import annotations

import ctypes
import mmap
from types import TracebackType
from typing import Self

import numpy as np

from amig.kvm.abi_numbers import ExitReason
from amig.kvm.cpuid import CpuModel
from amig.kvm.system import Kvm
from amig.kvm.vm import Vm

CODE = 0x1000
SIZE = 1 << 20

SPIN = bytes.fromhex("ebfe")
"""``jmp $``"""
HALT = bytes.fromhex("f4")
STORE = bytes.fromhex("8807f4")
"""``mov [bx], al; hlt``: one write to the page that DS points to."""


class TinyGuest:
    """A VM with one slot (0) of ``pages`` pages at address 0 and one vCPU at the code's first byte."""

    def __init__(
        self, code: bytes = STORE, *, pages: int = 256, irqchip: bool = False, manual: bool | None = None
    ) -> None:
        self.kvm = Kvm.open()
        self.vm: Vm = self.kvm.create_vm()
        self.pages = pages
        if manual is not None:
            self.protect = self.vm.enable_manual_protect(initially_set=manual)
        self.vm.set_tss_addr(0xFFFB_D000)
        self.vm.set_identity_map_addr(0xFFFB_C000)
        if irqchip:
            self.vm.create_irqchip()
            self.vm.create_pit2()
        self.memory = mmap.mmap(-1, pages * 4096)
        self._pin = ctypes.c_char.from_buffer(self.memory)
        self.address = ctypes.addressof(self._pin)
        self.vm.set_memory_region(0, 0, pages * 4096, self.address)
        self.memory[CODE : CODE + len(code)] = code
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid2(CpuModel.host(self.kvm.supported_cpuid()).for_vcpu(0, 1))
        self.start_at(CODE)

    def start_at(self, rip: int, **registers: int) -> None:
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.get_regs()
        regs.rip, regs.rflags = rip, 2
        for name, value in registers.items():
            setattr(regs, name, value)
        self.vcpu.set_regs(regs)

    def log(self, on: bool = True) -> None:
        self.vm.set_dirty_logging(0, on)

    def write(self, page: int, value: int = 1) -> None:
        """Let the guest write the first byte of ``page``."""
        sregs = self.vcpu.get_sregs()
        sregs.ds.selector, sregs.ds.base = page << 8, page << 12
        self.vcpu.set_sregs(sregs)
        self.start_at(CODE, rax=value, rbx=0)
        assert self.vcpu.run() is ExitReason.HLT
        assert self.memory[page << 12] == value

    def dirty(self) -> list[int]:
        """The pages that KVM_GET_DIRTY_LOG reports, less the one that holds the code.

        Nested paging may count that as written when it is fetched; nothing is promised about it.
        """
        out = np.zeros((self.pages + 63) // 64, dtype=np.uint64)
        self.vm.get_dirty_log(0, out)
        pages = np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little"))
        return [page for page in pages.tolist() if page != CODE >> 12]

    def clear(self, pages: list[int], first: int = 0, count: int | None = None) -> None:
        count = self.pages - first if count is None else count
        bitmap = np.zeros((count + 63) // 64, dtype=np.uint64)
        for page in pages:
            bitmap[(page - first) // 64] |= np.uint64(1 << (page - first) % 64)
        self.vm.clear_dirty_log(0, first, count, bitmap)

    def close(self) -> None:
        self.vm.close()
        self.kvm.close()
        del self._pin
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
