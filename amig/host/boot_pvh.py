"""Booting an ELF image the PVH way; source: Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h."""

from __future__ import annotations

import struct

from amig.errors import BootError
from amig.host import elf, guest_abi, layout
from amig.host.boot import BootConfig, BootPlan, Claims, Entry, Mode, encode_append, put_acpi, read_image
from amig.host.memory import MemfdMemory

START_INFO = 0x1000
MODULE_LIST = 0x1040
MEMORY_MAP = 0x1100
COMMAND_LINE = 0x2000

_NOTE_OWNER = b"Xen"
_NOTE_PHYS32_ENTRY = 18
_MAGIC = 0x336EC578
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_RANGE = struct.Struct("<QQII")


def load(memory: MemfdMemory, config: BootConfig, image: bytes, *, vcpus: int, tsc_khz: int) -> BootPlan:
    """Load ``image``, an ELF file with a PVH note, into fresh (all zero) guest memory.

    An image with amig's note starts all vCPUs directly, and is told ``vcpus=`` and ``tsc_khz=`` after the caller's own
    words. Raises `BootError` or `UsageError`.
    """
    parsed = elf.parse(image)
    claims = Claims(memory)
    for number, segment in enumerate(parsed.segments):
        claims.claim(segment.paddr, segment.memsz, f"segment {number} of the kernel")
        memory.write(segment.paddr, segment.data)
    entry = _entry(parsed)
    descriptor = parsed.note(guest_abi.NOTE_NAME.rstrip(b"\0"), guest_abi.NOTE_BOOT)
    append = config.append
    entries: list[Entry | None] = [Entry(mode=Mode.PROTECTED, rip=entry, rbx=START_INFO)]
    if descriptor is not None:
        note = guest_abi.parse_note(descriptor)
        if vcpus > note.max_cpus:
            raise BootError(f"this guest image runs at most {note.max_cpus} vCPUs, not {vcpus}")
        _check_entry(parsed, note.ap_entry)
        append = f"{append} tsc_khz={tsc_khz} vcpus={vcpus}".strip()
        entries += [
            Entry(mode=Mode.PROTECTED, rip=note.ap_entry, rbx=START_INFO, rdi=index) for index in range(1, vcpus)
        ]
    entries += [None] * (vcpus - len(entries))

    claims.put(COMMAND_LINE, encode_append(append), "the command line")
    modules = _load_initrd(claims, config)
    ranges = layout.physical_ranges(memory.map)
    table = b"".join(_RANGE.pack(r.start, r.size, r.type, 0) for r in ranges)
    claims.put(MEMORY_MAP, table, "the memory map")
    info = _START_INFO.pack(
        _MAGIC, 1, 0, modules, MODULE_LIST if modules else 0, COMMAND_LINE,
        put_acpi(memory, vcpus), MEMORY_MAP, len(ranges), 0,
    )  # fmt: skip
    claims.put(START_INFO, info, "the start info")
    return BootPlan(entries=tuple(entries), kind="pvh" if descriptor is None else "amig")


def _entry(parsed: elf.ElfImage) -> int:
    descriptor = parsed.note(_NOTE_OWNER, _NOTE_PHYS32_ENTRY)
    if descriptor is None:
        raise BootError("the ELF file has no PVH note: link it with one (XEN_ELFNOTE_PHYS32_ENTRY), or give a bzImage")
    if len(descriptor) not in (4, 8):
        raise BootError(f"the PVH note has {len(descriptor)} bytes, not 4 or 8")
    entry = int.from_bytes(descriptor, "little")
    _check_entry(parsed, entry)
    return entry


def _check_entry(parsed: elf.ElfImage, entry: int) -> None:
    if entry >= 1 << 32 or not any(s.paddr <= entry < s.paddr + s.memsz for s in parsed.segments):
        raise BootError(f"the kernel's entry {entry:#x} lies outside of what is loaded")


def _load_initrd(claims: Claims, config: BootConfig) -> int:
    if config.initrd is None:
        return 0
    data = read_image(config.initrd, "initrd")
    start = claims.claim_high(len(data), layout.HOLE_START, "the initrd")
    claims.memory.write(start, data)
    claims.put(MODULE_LIST, _MODULE.pack(start, len(data), 0, 0), "the module list")
    return 1
