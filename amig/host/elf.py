"""Reading an ELF executable: what to load where, and its notes. The file is hostile until checked."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from amig.errors import BootError

MAGIC = b"\x7fELF"

_CLASS32, _CLASS64 = 1, 2
_LITTLE_ENDIAN = 1
_MACHINES = {3: "i386", 62: "x86-64"}
_PT_LOAD, _PT_NOTE = 1, 4
_MAX_HEADERS = 256
_MAX_NOTES = 256
_MAX_NOTE_BYTES = 64 << 10

# ELF32: e_entry is 4 bytes, and p_flags stands elsewhere.
_HEADER = {_CLASS32: struct.Struct("<HHIIIIIHHH"), _CLASS64: struct.Struct("<HHIQQQIHHH")}
_SEGMENT = {_CLASS32: struct.Struct("<IIIIIIII"), _CLASS64: struct.Struct("<IIQQQQQQ")}
_NOTE = struct.Struct("<III")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part to load: ``data`` at physical address ``paddr``, then zeros up to ``memsz`` bytes."""

    paddr: int
    memsz: int
    data: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One ELF note: ``type`` means what its owner ``name`` says it does."""

    name: bytes
    type: int
    desc: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ElfImage:
    """What a loader needs of an x86 ELF file."""

    entry: int
    segments: tuple[Segment, ...]
    notes: tuple[Note, ...]

    def note(self, name: bytes, note_type: int) -> bytes | None:
        """Return the descriptor of the first note of that owner and type, or None."""
        return next((n.desc for n in self.notes if n.name == name and n.type == note_type), None)


def parse(data: bytes) -> ElfImage:
    """Read the headers of an x86 ELF file, 32 or 64 bit; no copy of what is to be loaded.

    Raises `BootError` when it isn't one, or when any offset or size leaves the file.
    """
    view = memoryview(data)
    if bytes(view[:4]) != MAGIC or len(view) < 52:
        raise BootError("not an ELF file")
    kind = view[4]
    if kind not in _HEADER or view[5] != _LITTLE_ENDIAN:
        raise BootError("an ELF file, but not a little-endian one of 32 or 64 bit")
    if len(view) < 16 + _HEADER[kind].size:
        raise BootError("the ELF header is cut off")
    _, machine, _, entry, table, _, _, _, entry_size, count = _HEADER[kind].unpack_from(view, 16)
    if machine not in _MACHINES:
        raise BootError(f"the kernel image is for another processor (ELF machine {machine})")
    shape = _SEGMENT[kind]
    if count > _MAX_HEADERS or (count and entry_size != shape.size):
        raise BootError(f"the ELF file has {count} program headers of {entry_size} bytes")
    segments: list[Segment] = []
    notes: list[Note] = []
    for i in range(count):
        fields = shape.unpack(_slice(view, table + i * shape.size, shape.size, "program headers"))
        if kind == _CLASS32:
            what, offset, _, paddr, filesz, memsz, _, align = fields
        else:
            what, _, offset, _, paddr, filesz, memsz, align = fields
        if what == _PT_LOAD and memsz:
            if filesz > memsz:
                raise BootError(f"ELF segment {i} has more bytes in the file than in memory")
            segments.append(Segment(paddr=paddr, memsz=memsz, data=_slice(view, offset, filesz, f"segment {i}")))
        elif what == _PT_NOTE:
            if filesz > _MAX_NOTE_BYTES:
                raise BootError(f"the ELF file has a segment of {filesz} bytes of notes")
            found = _notes(_slice(view, offset, filesz, "notes"), 8 if align == 8 else 4)
            notes += islice(found, _MAX_NOTES + 1 - len(notes))
            if len(notes) > _MAX_NOTES:
                raise BootError("the ELF file has too many notes")
    if not segments:
        raise BootError("the ELF file has nothing to load")
    return ElfImage(entry=entry, segments=tuple(segments), notes=tuple(notes))


def _slice(view: memoryview, offset: int, size: int, what: str) -> memoryview:
    if offset + size > len(view):
        raise BootError(f"the ELF file ends within its {what}")
    return view[offset : offset + size]


def _notes(view: memoryview, align: int) -> Iterator[Note]:
    at = 0
    while at + _NOTE.size <= len(view):
        name_size, desc_size, note_type = _NOTE.unpack_from(view, at)
        name_at = at + _NOTE.size
        desc_at = -(-(name_at + name_size) // align) * align
        end = desc_at + desc_size
        if end > len(view):
            raise BootError("an ELF note leaves its segment")
        name = bytes(view[name_at : name_at + name_size]).rstrip(b"\0")
        yield Note(name=name, type=note_type, desc=bytes(view[desc_at:end]))
        at = -(-end // align) * align
