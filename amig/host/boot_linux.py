"""Booting Linux as distributions ship it; source: Documentation/arch/x86/boot.rst, the 64-bit boot protocol."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from amig.errors import BootError, UsageError
from amig.host import layout
from amig.host.boot import BootConfig, BootPlan, Claims, Entry, Mode, encode_append, put_acpi, read_image
from amig.host.memory import MemfdMemory
from amig.memory import PAGE_SIZE

GDT = 0x1000
ZERO_PAGE = 0x7000
STACK_TOP = 0x9000
PAGE_TABLES = 0x9000
COMMAND_LINE = 0x20000

_HEADER_AT = 0x1F1
_HEADER_END = 0x290
_MIN_VERSION = 0x020C
_XLF_KERNEL_64 = 1
_ENTRY_64 = 0x200
_LOADER_UNDEFINED = 0xFF
_E820_MAX = 128
_RANGE = struct.Struct("<QQI")
_PRESENT_WRITABLE, _LARGE = 0x3, 0x80
# Selectors 0x10 and 0x18, as the protocol demands: flat 64-bit code, flat data.
_GDT_ENTRIES = struct.pack("<4Q", 0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupHeader:
    """The parts of a bzImage's header that a 64-bit boot needs."""

    raw: bytes
    """From 0x1f1 on, to be copied into the zero page."""
    payload: int
    """File offset of the part to load."""
    initrd_max: int
    alignment: int
    relocatable: bool
    command_line_max: int
    preferred: int
    init_size: int

    @classmethod
    def parse(cls, image: bytes) -> Self:
        """Check and read it; raises `BootError`."""
        if len(image) < 0x268 or image[0x202:0x206] != b"HdrS":
            raise BootError("not a Linux bzImage")
        (version,) = struct.unpack_from("<H", image, 0x206)
        if version < _MIN_VERSION:
            raise BootError(f"a Linux with boot protocol {version >> 8}.{version & 255:02}: 2.12 (Linux 3.8) is needed")
        (xloadflags,) = struct.unpack_from("<H", image, 0x236)
        if not xloadflags & _XLF_KERNEL_64:
            raise BootError("this Linux is not a 64-bit kernel")
        payload = ((image[_HEADER_AT] or 4) + 1) * 512
        end = 0x202 + image[0x201]
        (alignment,) = struct.unpack_from("<I", image, 0x230)
        header = cls(
            raw=image[_HEADER_AT:end],
            payload=payload,
            initrd_max=struct.unpack_from("<I", image, 0x22C)[0],
            alignment=alignment,
            relocatable=bool(image[0x234]),
            command_line_max=struct.unpack_from("<I", image, 0x238)[0],
            preferred=struct.unpack_from("<Q", image, 0x258)[0],
            init_size=struct.unpack_from("<I", image, 0x260)[0],
        )
        if (
            len(image) <= payload + _ENTRY_64
            or not 0x268 <= end <= _HEADER_END
            or alignment & (alignment - 1)
            or not alignment
        ):
            raise BootError("the bzImage's header contradicts itself")
        return header


def is_linux(image: bytes) -> bool:
    """Whether the file has a Linux setup header."""
    return image[0x202:0x206] == b"HdrS"


def load(memory: MemfdMemory, config: BootConfig, image: bytes, *, vcpus: int) -> BootPlan:
    """Load a bzImage into fresh (all zero) guest memory; vCPUs but the first wait for their start-up interrupt.

    Raises `BootError` or `UsageError`.
    """
    header = SetupHeader.parse(image)
    claims = Claims(memory)
    line = encode_append(config.append)
    if len(line) - 1 > header.command_line_max:
        raise UsageError(f"this kernel takes a command line of {header.command_line_max} bytes, not {len(line) - 1}")
    claims.put(COMMAND_LINE, line, "the command line")
    claims.put(GDT, _GDT_ENTRIES, "the descriptor table")
    claims.put(PAGE_TABLES, _page_tables(), "the page tables")

    kernel = memoryview(image)[header.payload :]
    address = _claim_kernel(claims, header, max(header.init_size, len(kernel)))
    memory.write(address, kernel)

    zero_page = bytearray(PAGE_SIZE)
    zero_page[_HEADER_AT : _HEADER_AT + len(header.raw)] = header.raw
    zero_page[0x210] = _LOADER_UNDEFINED
    struct.pack_into("<I", zero_page, 0x228, COMMAND_LINE)
    if config.initrd is not None:
        initrd = read_image(config.initrd, "initrd")
        start = claims.claim_high(len(initrd), header.initrd_max + 1, "the initrd")
        memory.write(start, initrd)
        struct.pack_into("<II", zero_page, 0x218, start, len(initrd))
    struct.pack_into("<Q", zero_page, 0x070, put_acpi(memory, vcpus))
    ranges = layout.physical_ranges(memory.map)
    if len(ranges) > _E820_MAX:
        raise BootError(f"a memory map of {len(ranges)} ranges does not fit Linux's boot parameters")
    zero_page[0x1E8] = len(ranges)
    for i, r in enumerate(ranges):
        _RANGE.pack_into(zero_page, 0x2D0 + i * _RANGE.size, r.start, r.size, r.type)
    claims.put(ZERO_PAGE, bytes(zero_page), "the boot parameters")

    first = Entry(
        mode=Mode.LONG, rip=address + _ENTRY_64, rsi=ZERO_PAGE, rsp=STACK_TOP,
        cr3=PAGE_TABLES, gdt=GDT, gdt_limit=len(_GDT_ENTRIES) - 1,
    )  # fmt: skip
    return BootPlan(entries=(first, *[None] * (vcpus - 1)), kind="linux")


def _claim_kernel(claims: Claims, header: SetupHeader, size: int) -> int:
    """Take the place that the kernel was linked for, or, if it can move, the lowest that fits."""
    try:
        claims.claim(header.preferred, size, "the kernel")
    except BootError:
        lowest = -(-layout.HIGH_RAM_START // header.alignment) * header.alignment
        if not header.relocatable or lowest >= header.preferred:
            raise
        claims.claim(lowest, size, "the kernel")
        return lowest
    return header.preferred


def _page_tables() -> bytes:
    """Identity-map the first 4 GiB with 2 MiB pages: one PML4, one PDPT, four PDs."""
    pml4 = struct.pack("<Q", PAGE_TABLES + PAGE_SIZE | _PRESENT_WRITABLE).ljust(PAGE_SIZE, b"\0")
    pds = [PAGE_TABLES + (2 + i) * PAGE_SIZE | _PRESENT_WRITABLE for i in range(4)]
    pdpt = struct.pack("<4Q", *pds).ljust(PAGE_SIZE, b"\0")
    entries = [i << 21 | _PRESENT_WRITABLE | _LARGE for i in range(4 * 512)]
    return pml4 + pdpt + struct.pack("<2048Q", *entries)
