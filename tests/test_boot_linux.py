"""Loading a bzImage: the zero page and the machine state of the 64-bit boot protocol."""

import struct
from itertools import pairwise

import pytest

from amig.errors import BootError, UsageError
from amig.host import acpi, boot_linux
from amig.host.boot import BootConfig, Mode
from amig.host.images import image_path
from amig.host.layout import GIB, MIB
from amig.host.memory import MemfdMemory
from tests.images import bzimage


@pytest.fixture
def memory():
    m = MemfdMemory.create(64 * MIB)
    yield m
    m.close()


def load(memory, data, *, vcpus=1, append="", initrd=None):
    return boot_linux.load(memory, BootConfig(kernel=image_path(), append=append, initrd=initrd), data, vcpus=vcpus)


def field(memory, at, shape):
    return struct.unpack(shape, memory.read(boot_linux.ZERO_PAGE + at, struct.calcsize(shape)))[0]


def test_the_kernel_lies_where_it_was_linked_for_and_is_entered_at_0x200(memory):
    plan = load(memory, bzimage(), vcpus=2, append="console=ttyS0")
    first, second = plan.entries
    assert plan.kind == "linux"
    assert (first.mode, first.rip, first.rsi) == (Mode.LONG, 16 * MIB + 0x200, boot_linux.ZERO_PAGE)
    assert second is None, "further vCPUs wait for their start-up interrupt"
    assert memory.read(16 * MIB, 6) == b"kernel"


def test_the_zero_page_says_what_the_protocol_demands(memory):
    load(memory, bzimage(), append="console=ttyS0 quiet")
    assert memory.read(boot_linux.ZERO_PAGE + 0x202, 4) == b"HdrS"
    assert field(memory, 0x210, "<B") == 0xFF
    line = memory.read(field(memory, 0x228, "<I"), 100).split(b"\0")[0]
    assert line == b"console=ttyS0 quiet"
    assert field(memory, 0x070, "<Q") == acpi.rsdp_address()
    assert memory.read(acpi.rsdp_address(), 8) == b"RSD PTR "


def test_the_memory_map_is_told_above_4_gib_too():
    memory = MemfdMemory.create(5 * GIB)
    try:
        load(memory, bzimage())
        count = field(memory, 0x1E8, "<B")
        e820 = [struct.unpack("<QQI", memory.read(boot_linux.ZERO_PAGE + 0x2D0 + 20 * i, 20)) for i in range(count)]
        ram = [(start, size) for start, size, kind in e820 if kind == 1]
        assert ram == [(0, 0x9FC00), (MIB, 3 * GIB - MIB), (4 * GIB, 2 * GIB)]
        assert all(a + b <= c for (a, b, _), (c, _, _) in pairwise(e820))
    finally:
        memory.close()


def test_the_page_tables_map_the_first_4_gib_one_to_one(memory):
    (first,) = load(memory, bzimage()).entries

    def entry(table, index):
        return struct.unpack("<Q", memory.read((table & ~0xFFF) + 8 * index, 8))[0]

    for address in (0, boot_linux.ZERO_PAGE, 16 * MIB + 0x200, 3 * GIB + 5 * MIB, 4 * GIB - 1):
        pdpt = entry(first.cr3, address >> 39)
        pd = entry(pdpt, address >> 30 & 511)
        leaf = entry(pd, address >> 21 & 511)
        assert leaf & 0x83 == 0x83
        assert (leaf & ~0x1FFFFF) + (address & 0x1FFFFF) == address
    code, data = struct.unpack("<2Q", memory.read(first.gdt + 0x10, 16))
    assert code >> 53 & 1, "selector 0x10 is 64-bit code"
    assert data >> 40 & 0x9F == 0x93


def test_an_initrd_lies_as_high_as_the_kernel_allows(memory, tmp_path):
    path = tmp_path / "initrd"
    path.write_bytes(b"i" * 5000)
    load(memory, bzimage(), initrd=path)
    start, size = field(memory, 0x218, "<I"), field(memory, 0x21C, "<I")
    assert (start, size) == (64 * MIB - 8192, 5000)
    assert memory.read(start, size) == b"i" * 5000
    other = MemfdMemory.create(64 * MIB)
    try:
        load(other, bzimage(initrd_max=32 * MIB - 1), initrd=path)
        assert field(other, 0x218, "<I") == 32 * MIB - 8192
    finally:
        other.close()


def test_a_kernel_that_can_move_goes_lower_when_it_must(memory):
    big = {"preferred": 16 * MIB, "init_size": 56 * MIB}
    (first,) = load(memory, bzimage(**big)).entries
    assert first.rip == 2 * MIB + 0x200
    other = MemfdMemory.create(64 * MIB)
    try:
        with pytest.raises(BootError, match="does not fit the guest's memory: give it more"):
            load(other, bzimage(relocatable=0, **big))
    finally:
        other.close()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a Linux bzImage"),
        (bzimage()[:0x260], "not a Linux bzImage"),
        (bzimage(version=0x020B), "boot protocol 2.11"),
        (bzimage(xloadflags=0), "not a 64-bit kernel"),
        (bzimage(sectors=200)[:4096], "contradicts itself"),
        (bzimage(header_end=0x2A0), "contradicts itself"),
        (bzimage(header_end=0x210), "contradicts itself"),
        (bzimage(alignment=3), "contradicts itself"),
        (bzimage(alignment=0), "contradicts itself"),
        (bzimage(init_size=1 << 31), "does not fit"),
        (bzimage(preferred=1 << 50, relocatable=0), "does not fit"),
        (bzimage(preferred=0, relocatable=0, init_size=0x8000), "would overwrite"),
    ],
)
def test_a_malformed_image_is_refused(memory, data, why):
    with pytest.raises(BootError, match=why):
        load(memory, data)


def test_sectors_of_zero_mean_four(memory):
    load(memory, bzimage(sectors=0))
    assert memory.read(16 * MIB, 6) == b"kernel"


def test_a_command_line_beyond_the_kernels_limit_is_refused(memory):
    load(memory, bzimage(cmdline_max=20), append="x" * 20)
    with pytest.raises(UsageError, match="20 bytes, not 21"):
        load(memory, bzimage(cmdline_max=20), append="x" * 21)
