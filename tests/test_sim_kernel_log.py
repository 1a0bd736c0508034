"""The model of the kernel's log does what KVM api.rst and kvm_main.c say."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amig import bitmap
from amig.dirty.log import KernelLog, LogAbilities
from amig.errors import KvmError
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot, Words
from amig.sim.kernel_log import SimKernelLog

PAGES = 200
ONES_FIRST = LogAbilities(manual_clear=True, initially_set=True)
ZEROS_FIRST = LogAbilities(manual_clear=True, initially_set=False)
OLD = LogAbilities(manual_clear=False, initially_set=False)


def layout(*sizes: int) -> MemoryMap:
    return MemoryMap(
        generation=0,
        regions=tuple(Region(id=i, size=pages * PAGE_SIZE) for i, pages in enumerate(sizes)),
        slots=tuple(
            Slot(index=i, guest_phys=i << 32, size=pages * PAGE_SIZE, region=i, offset=0)
            for i, pages in enumerate(sizes)
        ),
    )


def make(abilities: LogAbilities = ZEROS_FIRST, *, manual: bool = True) -> SimKernelLog:
    log = SimKernelLog(layout(PAGES), abilities)
    log.start(0, manual=manual)
    return log


def got(log: KernelLog) -> list[int]:
    out = np.full(bitmap.words_for(PAGES) + 1, bitmap.ALL)
    log.get(0, out)
    assert out[-1] == bitmap.ALL, "nothing is written past the slot's bitmap"
    pages: list[int] = bitmap.to_pages(out[:-1]).tolist()
    return pages


def clear(log: KernelLog, first: int, count: int, pages: list[int]) -> None:
    log.clear(0, first, count, bitmap.from_pages([page - first for page in pages], max(count, 1)))


@contextmanager
def failing(number: int) -> Iterator[None]:
    with pytest.raises(KvmError, match=errno.errorcode[number]) as caught:
        yield
    assert caught.value.errno == number


def test_a_manual_get_only_reads() -> None:
    log = make()
    assert log.guest_write(0, [3, 3, 199]) == 2
    assert got(log) == got(log) == [3, 199]
    assert log.guest_write(0, [3]) == 0, "no fault: the page is not protected"


def test_an_automatic_get_clears_and_protects() -> None:
    log = make(manual=False)
    log.guest_write(0, [3, 199])
    assert got(log) == [3, 199]
    assert got(log) == []
    assert log.guest_write(0, [3]) == 1
    assert got(log) == [3]


def test_clear_clears_and_protects_just_what_it_names() -> None:
    log = make()
    log.guest_write(0, [1, 2, 70])
    clear(log, 0, 128, [1, 3])  # 3 is clean: a no-op
    assert got(log) == [2, 70]
    assert log.guest_write(0, [1, 2]) == 1
    clear(log, 64, 136, [70, 199])
    assert got(log) == [1, 2]


def test_initially_set_needs_manual_mode() -> None:
    assert got(make(ONES_FIRST)) == list(range(PAGES))
    assert got(make(ONES_FIRST, manual=False)) == []
    assert got(make(ZEROS_FIRST)) == []


def test_off_and_on_starts_again() -> None:
    log = make(ONES_FIRST)
    clear(log, 0, PAGES, list(range(PAGES)))
    assert got(log) == []
    log.start(0, manual=True)
    assert got(log) == [], "already on: nothing changes"
    log.stop(0)
    log.guest_write(0, [5])
    log.start(0, manual=True)
    assert got(log) == list(range(PAGES))


@pytest.mark.parametrize(
    ("first", "count"), [(1, 64), (63, 137), (64, 65), (0, 199), (0, 201), (256, 0), (192, 9), (-64, 64), (64, -64)]
)
def test_ranges_that_kvm_refuses(first: int, count: int) -> None:
    log = make()
    log.guest_write(0, range(PAGES))
    with failing(errno.EINVAL):
        log.clear(0, first, count, bitmap.ones(256))
    assert got(log) == list(range(PAGES))


@pytest.mark.parametrize(("first", "count"), [(0, 64), (0, 200), (128, 72), (192, 8), (64, 0), (64, 128)])
def test_ranges_that_kvm_takes(first: int, count: int) -> None:
    log = make()
    log.guest_write(0, range(PAGES))
    log.clear(0, first, count, bitmap.ones(256))
    # A bitmap of whole words may have bits past the range's end, and they are past the slot's end then.
    assert got(log) == [page for page in range(PAGES) if not first <= page < first + count]


def test_calls_out_of_place() -> None:
    log = SimKernelLog(layout(PAGES, 64), OLD)
    with failing(errno.ENOENT):
        got(log)
    with failing(errno.ENOENT):
        log.start(9, manual=False)
    with failing(errno.EINVAL):
        log.start(0, manual=True)
    log.start(0, manual=False)
    with failing(errno.EINVAL):
        clear(log, 0, 64, [])
    with failing(errno.EFAULT):
        log.get(0, bitmap.zeros(64))
    log = SimKernelLog(layout(PAGES, 64))
    log.start(0, manual=True)
    with failing(errno.EINVAL):
        log.start(1, manual=False)
    with failing(errno.EFAULT):
        log.clear(0, 0, 128, bitmap.zeros(64))
    with pytest.raises(IndexError):
        log.guest_write(0, [PAGES])


def test_slots_come_and_go() -> None:
    log = make()
    log.guest_write(0, [4])
    log.set_slots(layout(PAGES, 64))
    assert got(log) == [4]
    assert log.peek(1) is None
    log.set_slots(layout(PAGES), replaced=(0,))
    assert log.peek(0) is None
    with failing(errno.ENOENT):
        log.stop(1)


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.sets(st.integers(0, PAGES - 1), max_size=9)),
            st.tuples(st.just("clear"), st.sets(st.integers(0, PAGES - 1))),
            st.tuples(st.just("get"), st.just(set())),
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_against_a_set_of_pages(steps: list[tuple[str, set[int]]], manual: bool) -> None:
    log = make(manual=manual)
    dirty: set[int] = set()
    for step, pages in steps:
        if step == "write":
            assert log.guest_write(0, sorted(pages)) == len(pages - dirty)
            dirty |= pages
        elif step == "clear":
            clear(log, 0, PAGES, sorted(pages))
            dirty -= pages
        else:
            assert got(log) == sorted(dirty)
            if not manual:
                dirty = set()
    words: Words | None = log.peek(0)
    assert words is not None
    assert bitmap.to_pages(words).tolist() == sorted(dirty)
