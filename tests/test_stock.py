"""Memory that is ready before its guest comes: given once, given back whole, and never more than there is."""

from __future__ import annotations

import threading

import pytest

from amig.errors import HostError, Refused, UsageError
from amig.host.layout import memory_map
from amig.host.room import Room
from amig.host.stock import MemoryStock, in_use
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot

MIB = 1 << 20
AHEAD = 160 * MIB
"""Some steps of backing."""


def plenty() -> Room:
    return Room(bytes=1 << 40, limit="a test")


def prepared(ahead: int = AHEAD, **more: object) -> MemoryStock:
    stock = MemoryStock(ahead=ahead, look=plenty, **more)  # type: ignore[arg-type]
    stock.prepare(threading.Event())
    assert stock.prepared == ahead
    return stock


def test_a_guest_of_that_size_gets_what_was_prepared() -> None:
    stock = prepared()
    memory = stock.make(memory_map(AHEAD))
    try:
        assert memory.backed
        assert in_use(memory.fds().values()) == AHEAD
        assert stock.prepared == 0
        assert not memory.pages(0).any()
    finally:
        memory.close()


def test_a_smaller_guest_gets_its_part_and_the_rest_is_given_back() -> None:
    stock = prepared()
    layout = MemoryMap(
        generation=3,
        regions=(Region(id=7, size=32 * MIB),),
        slots=(Slot(index=0, guest_phys=0, size=32 * MIB, region=7, offset=0),),
    )
    memory = stock.make(layout)
    try:
        assert memory.map == layout
        assert memory.pages(7).shape == (32 * MIB // PAGE_SIZE, PAGE_SIZE)
        assert in_use(memory.fds().values()) == 32 * MIB
        with pytest.raises(UsageError):
            memory.populate(7, 0, 32 * MIB // PAGE_SIZE + 1)
        memory.write(32 * MIB - 1, b"x")
    finally:
        memory.close()


def test_a_larger_guest_gets_memory_as_without_and_somebody_hears_of_it() -> None:
    said: list[str] = []
    stock = prepared(tell=said.append)
    memory = stock.make(memory_map(AHEAD + PAGE_SIZE))
    try:
        assert not memory.backed
        assert in_use(memory.fds().values()) == 0
        assert stock.prepared == 0
        assert len(said) == 1
        assert "does not fit the 160 MiB" in said[0]
    finally:
        memory.close()


def test_a_guest_of_two_regions_does_not_fit() -> None:
    stock = prepared(4 * MIB)
    layout = MemoryMap(
        generation=0,
        regions=(Region(id=0, size=MIB), Region(id=1, size=MIB)),
        slots=(
            Slot(index=0, guest_phys=0, size=MIB, region=0, offset=0),
            Slot(index=1, guest_phys=MIB, size=MIB, region=1, offset=0),
        ),
    )
    memory = stock.make(layout)
    assert not memory.backed
    memory.close()


def test_who_comes_while_memory_is_being_made_ready_takes_it_as_it_is() -> None:
    """The thread that backs step after step must not keep the lock from the one that waits."""
    stock = MemoryStock(ahead=8 * AHEAD, look=plenty)
    thread = threading.Thread(target=stock.prepare, args=(threading.Event(),))
    thread.start()
    while not stock.prepared:
        assert thread.is_alive()
    memory = stock.make(memory_map(8 * AHEAD))
    try:
        thread.join(30)
        assert not thread.is_alive()
        assert not memory.backed
        assert 0 < in_use(memory.fds().values()) < 8 * AHEAD
    finally:
        memory.empty()
        memory.close()


def test_preparing_that_was_stopped_goes_on_where_it_was() -> None:
    stock = MemoryStock(ahead=AHEAD, look=plenty)
    stop = threading.Event()
    stop.set()
    stock.prepare(stop)
    assert stock.prepared == 0
    stock.prepare(threading.Event())
    assert stock.prepared == AHEAD
    stock.close()
    stock.close()
    assert stock.prepared == 0


def test_what_is_not_there_is_not_prepared() -> None:
    stock = MemoryStock(ahead=AHEAD, look=lambda: Room(bytes=AHEAD - 1, limit="control group /x"))
    with pytest.raises(HostError, match=r"can't prepare 160 MiB .* are left \(control group /x\)"):
        stock.prepare(threading.Event())
    assert stock.prepared == 0


def test_memory_that_runs_out_half_way_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from amig.host.memory import MemfdMemory

    def none_left(self: MemfdMemory, region: int, first: int, count: int) -> None:
        raise HostError("the system has no memory left")

    stock = MemoryStock(ahead=AHEAD, look=plenty)
    monkeypatch.setattr(MemfdMemory, "populate", none_left)
    with pytest.raises(HostError, match="no memory left"):
        stock.prepare(threading.Event())
    assert stock.prepared == 0


def test_a_guest_that_uses_more_than_is_left_is_refused_with_both_figures() -> None:
    left = Room(bytes=100 * MIB, limit="MemAvailable of this machine")
    stock = MemoryStock(look=lambda: left)
    stock.admit("web1", memory_map(1024 * MIB), 100 * MIB)  # holes cost nothing
    with pytest.raises(Refused, match=r"guest web1 needs 101 MiB of memory now, and 100 MiB are left here \(MemAv"):
        stock.admit("web1", memory_map(1024 * MIB), 101 * MIB)


def test_a_source_that_lies_about_its_use_needs_no_more_than_its_size() -> None:
    MemoryStock(look=lambda: Room(bytes=MIB, limit="x")).admit("web1", memory_map(MIB), 1 << 62)


def test_what_is_prepared_counts_as_left() -> None:
    left = [1 << 40]
    stock = MemoryStock(ahead=AHEAD, look=lambda: Room(bytes=left[0], limit="x"))
    stock.prepare(threading.Event())
    left[0] = MIB
    stock.admit("web1", memory_map(AHEAD), AHEAD)
    stock.admit("web1", memory_map(2 * AHEAD), AHEAD + MIB)
    with pytest.raises(Refused, match="161 MiB are left"):
        stock.admit("web1", memory_map(2 * AHEAD), AHEAD + 2 * MIB)
    stock.close()


def test_guests_beyond_the_limit_are_refused() -> None:
    stock = MemoryStock(limit=64 * MIB, look=plenty)
    stock.admit("web1", memory_map(64 * MIB), 0)
    with pytest.raises(Refused, match=r"web1 has 65 MiB of memory.* up to 64 MiB \(--max-memory\)"):
        stock.admit("web1", memory_map(65 * MIB), 0)


@pytest.mark.parametrize("sizes", [{"ahead": 5}, {"ahead": MIB, "hugepages": True}, {"ahead": 2 * MIB, "limit": MIB}])
def test_sizes_that_can_not_be_are_refused_at_once(sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        MemoryStock(**sizes)  # type: ignore[arg-type]
