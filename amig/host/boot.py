"""What all loaders share: the request, the state in which vCPUs start, and who has which piece of guest memory."""

from __future__ import annotations

import enum
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from amig.errors import BootError, UsageError
from amig.host import acpi, layout
from amig.host.memory import MemfdMemory
from amig.memory import PAGE_SIZE

MAX_KERNEL_BYTES = 1 << 30
MAX_APPEND_BYTES = 16 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BootConfig:
    """What to boot: files, read once, and the kernel's command line."""

    kernel: Path
    append: str = ""
    initrd: Path | None = None


class Mode(enum.Enum):
    """The processor mode that an image is entered in."""

    PROTECTED = "32-bit protected mode, flat, paging off"
    LONG = "64-bit mode, identity-mapped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where and how a vCPU starts; registers that aren't named are zero."""

    mode: Mode
    rip: int
    rbx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    cr3: int = 0
    gdt: int = 0
    gdt_limit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BootPlan:
    """A loaded image. ``entries[i]`` is vCPU i's start; None: it waits for a start-up interrupt."""

    entries: tuple[Entry | None, ...]
    kind: str
    """``"amig"`` for our own images, ``"pvh"``, ``"linux"``."""


@dataclass(slots=True)
class Claims:
    """Pieces of guest memory that are taken. Whatever a loader writes, it claims first."""

    memory: MemfdMemory
    _taken: list[tuple[int, int, str]] = field(default_factory=list)

    def claim(self, start: int, size: int, what: str) -> None:
        """Take ``size`` bytes; raises `BootError` when they aren't RAM that a kernel may use, or are taken."""
        end = start + size
        if not any(r.start <= start and end <= r.start + r.size for r in self._ram()):
            raise BootError(f"{what} ({start:#x} to {end:#x}) does not fit the guest's memory: give it more")
        for other_start, other_end, other in self._taken:
            if start < other_end and other_start < end:
                raise BootError(f"{what} ({start:#x} to {end:#x}) would overwrite {other}")
        self._taken.append((start, end, what))

    def claim_high(self, size: int, limit: int, what: str) -> int:
        """Take the highest free run of whole pages below ``limit`` (and below the hole); returns its start."""
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        top = max((r.start + r.size for r in self._ram() if r.start < layout.HOLE_START), default=0)
        top = min(top, limit) // PAGE_SIZE * PAGE_SIZE
        for start, end, _ in sorted(self._taken, reverse=True):
            if start < top and top - size < end:
                top = start // PAGE_SIZE * PAGE_SIZE
        if top - size < layout.HIGH_RAM_START:
            raise BootError(f"{what} of {size} bytes does not fit the guest's memory: give it more")
        self.claim(top - size, size, what)
        return top - size

    def put(self, start: int, data: bytes | memoryview, what: str) -> None:
        """Claim and write."""
        self.claim(start, len(data), what)
        self.memory.write(start, data)

    def _ram(self) -> list[layout.PhysRange]:
        return [r for r in layout.physical_ranges(self.memory.map) if r.type is layout.RangeType.RAM]


def read_image(path: Path, what: str, limit: int = MAX_KERNEL_BYTES) -> bytes:
    """Read a whole file; raises `BootError` that says what is wrong with it."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BootError(f"the {what} {path} is not a file")
            if not 0 < status.st_size <= limit:
                raise BootError(f"the {what} {path} has {status.st_size} bytes, which can't be right")
            return file.read(limit)
    except OSError as e:
        raise BootError(f"can't read the {what} {path}: {e.strerror}") from e


def encode_append(words: str) -> bytes:
    """Return a command line as bytes with its final zero; raises `UsageError` for what no kernel could read."""
    line = words.encode()
    if b"\0" in line or len(line) >= MAX_APPEND_BYTES:
        raise UsageError(f"the kernel's command line must be shorter than {MAX_APPEND_BYTES} bytes, without zeros")
    return line + b"\0"


def put_acpi(memory: MemfdMemory, vcpus: int) -> int:
    """Write the ACPI tables where no kernel takes the memory for its own; returns the root pointer's address."""
    memory.write(acpi.rsdp_address(), acpi.tables(vcpus))
    return acpi.rsdp_address()
