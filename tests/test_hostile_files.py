"""Small files that claim to be large: nothing is allocated for what they only claim."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from amig.errors import AmigError, BootError, HostError
from amig.host import elf
from amig.host.memory import MemfdMemory
from amig.memory import MAX_REGION_BYTES, MemoryMap, Region, Slot
from amig.session.snapshot_guest import SnapshotGuest
from amig.transport.file import MAGIC
from amig.wire import messages
from tests.fuzz import streams
from tests.fuzz.receiver import ID, last_words, round_end
from tests.images import LOAD, NOTE, elf_file, note

MIB = 1 << 20


def vast(regions: int) -> MemoryMap:
    """The largest memory map that passes for one."""
    return MemoryMap(
        generation=1,
        regions=tuple(Region(id=number, size=MAX_REGION_BYTES) for number in range(regions)),
        slots=(Slot(index=0, guest_phys=0, size=4096, region=0, offset=0),),
    )


@pytest.fixture
def allocated() -> Iterator[None]:
    """Nothing that a test does allocates much."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * MIB


@pytest.mark.parametrize("regions", [1, 7, 64])
@pytest.mark.usefixtures("allocated")
async def test_a_snapshot_of_more_memory_than_there_can_be_is_refused(regions: int, tmp_path: Path) -> None:
    hello = messages.Hello(
        migration=ID, name="web1", engine="kvm", vcpus=1, memory=vast(regions), machine=b"", memory_used=4096
    )
    words = b"".join(streams.cut(last_words(1, 0, 0))[:-1])
    path = tmp_path / "small"
    path.write_bytes(MAGIC + streams.message(hello) + round_end(0, 0) + words)
    with pytest.raises(AmigError, match="makes no sense"):
        await SnapshotGuest.load(str(path))


def test_a_large_sparse_guest_is_none_of_these() -> None:
    with pytest.raises(HostError, match="makes no sense"):
        MemfdMemory(vast(1))
    MemfdMemory.create(32 << 30).close()


@pytest.mark.usefixtures("allocated")
def test_notes_without_end_are_refused_before_they_are_read() -> None:
    notes = note(b"", 0, b"") * (64 << 10)
    with pytest.raises(BootError, match="bytes of notes"):
        elf.parse(elf_file((LOAD, 0, 1, 1, b"x"), (NOTE, 0, 0, 4, notes)))
    short = notes[: 60 << 10]
    with pytest.raises(BootError, match="too many notes"):
        elf.parse(elf_file((LOAD, 0, 1, 1, b"x"), (NOTE, 0, 0, 4, short)))


@pytest.mark.usefixtures("allocated")
def test_a_segment_that_becomes_vast_in_memory_costs_nothing_to_read() -> None:
    image = elf.parse(elf_file((LOAD, 0, 2**62, 1, b"x")))
    assert image.segments[0].memsz == 2**62
