"""Kernel images: an ELF file with a PVH note, or a bzImage, down to the bytes in guest memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from amig.errors import AmigError
from amig.host import boot_linux, boot_pvh, elf
from amig.host.boot import BootConfig
from amig.host.memory import MemfdMemory
from tests.images import LOAD, NOTE, amig_note, bzimage, elf_file, note, pvh_note

from .target import Target

MIB = 1 << 20
CONFIG = BootConfig(kernel=Path("kernel"), append="console=ttyS0")


def run(data: bytes) -> None:
    memory = MemfdMemory.create(24 * MIB)
    try:
        if boot_linux.is_linux(data):
            plan = boot_linux.load(memory, CONFIG, data, vcpus=2)
        else:
            plan = boot_pvh.load(memory, CONFIG, data, vcpus=2, tsc_khz=1000)
        assert len(plan.entries) == 2
        for entry in plan.entries:
            if entry is not None:
                memory.locate(entry.rip, 1)
    except AmigError:
        pass
    finally:
        memory.close()


def _image(*notes: bytes, **more: int) -> bytes:
    joined = b"".join(notes)
    return elf_file((LOAD, MIB, 0x2000, 4096, b"\xf4" * 64), (NOTE, 0, len(joined), 4, joined), **more)


def seeds() -> Iterator[tuple[str, bytes]]:
    yield "pvh-64", _image(pvh_note(MIB + 4))
    yield "pvh-32", _image(pvh_note(MIB + 4), bits=32)
    yield "amig", _image(pvh_note(MIB), amig_note(MIB + 8))
    yield "notes-of-8", elf_file((LOAD, MIB, 0x2000, 4096, b"\xf4"), (NOTE, 0, 64, 8, note(b"Xen", 18, bytes(8), 8)))
    yield "bzimage", bzimage(preferred=4 * MIB, init_size=1 << 16)
    yield "bzimage-moved", bzimage(preferred=64 * MIB, init_size=1 << 16)


TARGET = Target(
    name="kernel",
    run=run,
    seeds=seeds,
    most=8 << 10,
    memory=4 << 20,
    words=(elf.MAGIC, b"HdrS", b"Xen\0", b"amig\0"),
)
