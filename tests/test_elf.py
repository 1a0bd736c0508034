"""Reading ELF files, well-formed and not."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig.errors import BootError
from amig.host import elf
from tests.images import LOAD, NOTE, note
from tests.images import elf_file as make


@pytest.mark.parametrize("bits", [32, 64])
def test_segments_and_notes_are_found(bits):
    notes = note(b"Xen", 18, struct.pack("<I", 0x100020)) + note(b"amig", 1, b"12345678")
    image = elf.parse(make((LOAD, 0x100000, 0x3000, 4096, b"code"), (NOTE, 0, len(notes), 4, notes), bits=bits))
    (segment,) = image.segments
    assert (segment.paddr, segment.memsz, bytes(segment.data)) == (0x100000, 0x3000, b"code")
    assert image.entry == 0x100000
    assert image.note(b"Xen", 18) == struct.pack("<I", 0x100020)
    assert image.note(b"amig", 1) == b"12345678"
    assert image.note(b"amig", 2) is None


def test_notes_of_eight_byte_alignment_are_read():
    notes = note(b"Xen", 18, b"abcd", align=8) + note(b"GNU", 5, b"efgh", align=8)
    image = elf.parse(make((LOAD, 0, 1, 1, b""), (NOTE, 0, len(notes), 8, notes)))
    assert [(n.name, n.desc) for n in image.notes] == [(b"Xen", b"abcd"), (b"GNU", b"efgh")]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not an ELF"),
        (b"MZ" + bytes(100), "not an ELF"),
        (b"\x7fELF" + bytes(80), "little-endian"),
        (make((LOAD, 0, 1, 1, b"x"), machine=183), "another processor"),
        (make(), "nothing to load"),
        (make((LOAD, 0, 4, 1, b"12345678")), "more bytes in the file"),
        (make((LOAD, 0, 400, 1, b"12345678"))[:-1], "ends within"),
        (make((LOAD, 0, 1, 1, b"x"))[:70], "ends within"),
        (make(*[(LOAD, 0, 1, 1, b"x")] * 300), "300 program headers"),
        (make((LOAD, 0, 1, 1, b"x"), (NOTE, 0, 0, 4, struct.pack("<III", 4, 1 << 31, 1))), "leaves its segment"),
        (make((LOAD, 0, 1, 1, b"x"), (NOTE, 0, 0, 4, note(b"", 0, b"") * 300)), "too many notes"),
    ],
)
def test_a_malformed_file_is_refused(data, why):
    with pytest.raises(BootError, match=why):
        elf.parse(data)


GOOD = make((LOAD, 0x100000, 0x3000, 4096, b"code"), (NOTE, 0, 20, 4, note(b"Xen", 18, bytes(4))))


@given(st.lists(st.tuples(st.integers(4, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_garbage_never_does_anything_but_raise(changes):
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    try:
        image = elf.parse(bytes(data))
    except BootError:
        return
    assert all(len(s.data) <= s.memsz for s in image.segments)
