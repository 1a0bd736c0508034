"""The physical address map."""

import pytest

from amig.errors import UsageError
from amig.host import layout
from amig.host.layout import GIB, MIB, RangeType
from amig.memory import MemoryMap, Region, Slot


@pytest.mark.parametrize("size", [64 * MIB, 1400 * MIB, 3 * GIB])
def test_memory_up_to_the_hole_is_one_slot_at_zero(size):
    m = layout.memory_map(size)
    m.check()
    assert [(s.index, s.guest_phys, s.size, s.offset) for s in m.slots] == [(0, 0, size, 0)]
    assert m.size == size


@pytest.mark.parametrize("size", [3 * GIB + 4096, 4 * GIB, 17 * GIB])
def test_memory_beyond_the_hole_continues_at_4_gib(size):
    m = layout.memory_map(size)
    m.check()
    low, high = m.slots
    assert (low.guest_phys, low.size, low.offset) == (0, 3 * GIB, 0)
    assert (high.guest_phys, high.size, high.offset) == (4 * GIB, size - 3 * GIB, 3 * GIB)
    assert m.size == size


@pytest.mark.parametrize("size", [0, -4096, 4095, 1 << 60])
def test_a_size_that_makes_no_sense_is_refused(size):
    with pytest.raises(UsageError, match="guest memory of"):
        layout.memory_map(size)


def test_a_kernel_is_told_all_ram_but_the_reserved_first_mib():
    m = layout.memory_map(5 * GIB)
    ranges = layout.physical_ranges(m)
    ends = [r.start + r.size for r in ranges]
    assert all(end <= r.start for end, r in zip(ends, ranges[1:], strict=False)), "ranges are sorted and apart"
    ram = [r for r in ranges if r.type is RangeType.RAM]
    assert [(r.start, r.start + r.size) for r in ram] == [
        (0, 0x9FC00),
        (MIB, 3 * GIB),
        (4 * GIB, 6 * GIB),
    ]


def test_ram_that_starts_elsewhere_can_not_be_described():
    m = MemoryMap(
        generation=0,
        regions=(Region(id=0, size=4 * MIB),),
        slots=(Slot(index=0, guest_phys=MIB, size=4 * MIB, region=0, offset=0),),
    )
    with pytest.raises(UsageError, match="no RAM from address 0"):
        layout.physical_ranges(m)
