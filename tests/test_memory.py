"""Guest memory on memfds, in the process that made it and in the one it was passed to."""

import contextlib
import fcntl
import os

import numpy as np
import pytest

from amig.errors import HostError, UsageError
from amig.host.layout import GIB, MIB
from amig.host.mapping import create_memfd
from amig.host.memory import MappedMemory, MemfdMemory
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot


def two_views(size=1 * MIB):
    """One region that the guest sees twice."""
    return MemoryMap(
        generation=3,
        regions=(Region(id=7, size=size),),
        slots=(
            Slot(index=0, guest_phys=0, size=size, region=7, offset=0),
            Slot(index=1, guest_phys=GIB, size=size // 2, region=7, offset=size // 2),
        ),
    )


@pytest.fixture
def memory():
    m = MemfdMemory.create(2 * MIB)
    yield m
    m.close()


def open_descriptors():
    return set(os.listdir("/proc/self/fd"))


def test_pages_are_a_live_view(memory):
    pages = memory.pages(0)
    assert pages.shape == (512, PAGE_SIZE)
    assert not pages.any()
    pages[3, 5] = 9
    assert memory.read(3 * PAGE_SIZE + 5, 1) == b"\x09"


def test_memory_above_the_hole_is_reached_by_its_guest_address():
    memory = MemfdMemory.create(3 * GIB + 2 * MIB)
    try:
        memory.write(4 * GIB, b"high")
        assert memory.pages(0)[3 * GIB // PAGE_SIZE, :4].tobytes() == b"high"
        assert memory.data_ranges(0, 0, memory.map.region(0).pages) == [(3 * GIB // PAGE_SIZE, 1)]
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("gpa", "length"),
    [(2 * MIB, 1), (2 * MIB - 1, 2), (-1, 1), (0, 2 * MIB + 1), (1 << 64, 1), (0, -1), (3 * GIB, 16), (5, -4)],
)
def test_an_address_outside_of_memory_is_refused(memory, gpa, length):
    with pytest.raises(UsageError, match="not in the guest's memory"):
        memory.read(gpa, length)


def test_an_access_across_the_hole_is_refused():
    memory = MemfdMemory.create(3 * GIB + 2 * MIB)
    try:
        with pytest.raises(UsageError, match="not in the guest's memory"):
            memory.write(3 * GIB - 1, b"ab")
        with pytest.raises(UsageError, match="not in the guest's memory"):
            memory.read(4 * GIB - 1, 2)
    finally:
        memory.close()


def test_a_host_write_marks_its_pages_after_writing(memory):
    seen = []
    memory.on_write = lambda region, first, count: seen.append((region, first, count, memory.read(2 * PAGE_SIZE, 1)))
    memory.write(2 * PAGE_SIZE - 1, b"abc")
    assert seen == [(0, 1, 2, b"b")]
    memory.write(0, b"")
    assert len(seen) == 1
    with contextlib.suppress(ZeroDivisionError), memory.map_range(5 * PAGE_SIZE, PAGE_SIZE) as view:
        view[:] = 1 // 0
    assert seen[1][:3] == (0, 5, 1), "marked however the block ends"


def test_a_write_through_an_alias_marks_the_page_behind_it():
    memory = MemfdMemory(two_views())
    try:
        seen = []
        memory.on_write = lambda *mark: seen.append(mark)
        memory.write(GIB, b"x")
        assert seen == [(7, 128, 1)]
        assert memory.read(MIB // 2, 1) == b"x"
    finally:
        memory.close()


def test_holes_are_told_from_data(memory):
    assert memory.data_ranges(0, 0, 512) == []
    memory.pages(0)[4:6] = 1
    memory.pages(0)[100] = 1
    assert memory.data_ranges(0, 0, 512) == [(4, 2), (100, 1)]
    assert memory.data_ranges(0, 5, 95) == [(5, 1)]
    assert memory.data_ranges(0, 6, 10) == []
    memory.punch(0, 5, 1)
    assert memory.data_ranges(0, 0, 512) == [(4, 1), (100, 1)]
    assert not memory.pages(0)[5].any()


def test_populate_backs_pages_and_keeps_what_they_hold(memory):
    memory.pages(0)[10] = 7
    memory.populate(0, 8, 8)
    assert memory.data_ranges(0, 0, 512) == [(8, 8)]
    assert (memory.pages(0)[10] == 7).all()


def test_populate_works_on_a_kernel_without_the_advice(memory, monkeypatch):
    monkeypatch.setattr("amig.host.mapping._MADV_POPULATE_WRITE", 9999)
    memory.pages(0)[10] = 7
    memory.populate(0, 8, 8)
    assert os.fstat(memory.fds()[0]).st_blocks == 8 * PAGE_SIZE // 512
    assert (memory.pages(0)[10] == 7).all()


@pytest.mark.parametrize("call", ["data_ranges", "populate", "punch"])
def test_page_ranges_are_checked(memory, call):
    for first, count in [(-1, 2), (0, 513), (512, 1), (3, -1)]:
        with pytest.raises(UsageError):
            getattr(memory, call)(0, first, count)
    with pytest.raises(UsageError, match="no memory region 1"):
        getattr(memory, call)(1, 0, 1)


def test_an_array_outlives_close():
    memory = MemfdMemory.create(1 * MIB)
    pages = memory.pages(0)
    pages[0, 0] = 5
    memory.close()
    memory.close()
    assert pages[0, 0] == 5
    with pytest.raises(HostError, match="closed"):
        memory.pages(0)
    with pytest.raises(HostError, match="closed"):
        memory.read(0, 1)


def test_nothing_is_left_open():
    before = open_descriptors()
    memory = MemfdMemory.create(1 * MIB)
    memory.pages(0)[0] = 1
    memory.close()
    assert open_descriptors() == before


def test_another_process_sees_the_same_memory_and_cannot_write_it(memory):
    other = MappedMemory.from_fds(memory.map, {0: memory.readonly_fd(0)})
    try:
        memory.write(12345, b"shared")
        assert other.pages(0).reshape(-1)[12345:12351].tobytes() == b"shared"
        assert other.data_ranges(0, 0, 512) == [(3, 1)]
        with pytest.raises(ValueError, match="read-only"):
            other.pages(0)[0] = 1
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(other.fds()[0], b"x", 0)
    finally:
        other.close()


def test_the_memory_can_not_change_its_size(memory):
    for size in (0, 4 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fds()[0], size)


def test_a_descriptor_that_could_shrink_is_refused():
    before = open_descriptors()
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    with pytest.raises(UsageError, match="not sealed"):
        MappedMemory.from_fds(two_views(), {7: fd})
    assert open_descriptors() == before


def test_a_descriptor_that_is_too_small_is_refused():
    before = open_descriptors()
    with pytest.raises(UsageError, match="holds 524288"):
        MappedMemory.from_fds(two_views(), {7: create_memfd("small", MIB // 2)})
    assert open_descriptors() == before


def test_a_descriptor_that_is_no_memfd_is_refused(tmp_path):
    before = open_descriptors()
    with pytest.raises(UsageError, match="not a memfd"):
        MappedMemory.from_fds(two_views(), {7: os.open(tmp_path, os.O_RDONLY)})
    assert open_descriptors() == before


def test_descriptors_must_match_the_map():
    before = open_descriptors()
    with pytest.raises(UsageError, match="descriptors for regions"):
        MappedMemory.from_fds(two_views(), {7: create_memfd("a", MIB), 8: create_memfd("b", MIB)})
    assert open_descriptors() == before


def test_a_map_that_makes_no_sense_is_refused():
    bad = MemoryMap(generation=0, regions=(Region(id=0, size=4097),), slots=two_views().slots)
    with pytest.raises(UsageError):
        MemfdMemory(bad)


def test_huge_pages_are_had_or_asked_for():
    with pytest.raises(UsageError, match="multiple of 2 MiB"):
        MemfdMemory.create(3 * MIB, hugepages=True)
    before = open_descriptors()
    with open("/proc/meminfo") as f:
        free = next(int(line.split()[1]) for line in f if line.startswith("HugePages_Free"))
    size = (free + 1) * 2 * MIB
    with pytest.raises(HostError, match="guest memory"):
        MemfdMemory.create(size, hugepages=True)
    assert open_descriptors() == before
    if free:
        memory = MemfdMemory.create(2 * MIB, hugepages=True)
        memory.write(5, b"huge")
        assert memory.data_ranges(0, 0, 512) == [(0, 512)]
        memory.punch(0, 0, 512)
        assert memory.read(5, 4) == bytes(4)
        memory.close()


def test_the_view_has_the_address_that_kvm_is_given(memory):
    assert memory.address(0) == memory.pages(0).__array_interface__["data"][0]
    assert fcntl.fcntl(memory.fds()[0], 1034) & 2
    assert np.shares_memory(memory.pages(0), memory.pages(0)[1:])
