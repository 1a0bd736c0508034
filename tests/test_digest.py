"""Page digests: equal on two sides exactly when the final versions of all pages are, whatever came before."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from amig.digest import (
    MAX_ROOTS,
    MIN_RANGE_PAGES,
    PageDigests,
    PageRange,
    hash_all,
    hash_pages,
    named,
    present,
    range_pages,
)
from amig.memory import PAGE_SIZE, Region

PAGES = 3000
KEY = 0xFEDC_BA98_7654_3210
REGIONS = (Region(id=0, size=PAGES * PAGE_SIZE), Region(id=7, size=10 * PAGE_SIZE))


def memory(pages: int = PAGES, seed: int = 1) -> np.ndarray:
    made = np.zeros((pages, PAGE_SIZE), np.uint8)
    made[:, :16] = np.random.default_rng(seed).integers(1, 255, (pages, 16), np.uint8)
    return made


@pytest.mark.parametrize("index", [[5], [5, 6, 7, 8], [0, 2, 3, 2999]], ids=["one", "run", "scattered"])
def test_a_digest_is_the_keyed_hash_of_its_page(index: list[int]) -> None:
    pages = memory()
    expected = [xxhash.xxh3_64_intdigest(pages[page].tobytes(), KEY) for page in index]
    assert hash_pages(pages, np.array(index), KEY).tolist() == expected
    assert hash_pages(pages, np.array(index), KEY + 1).tolist() != expected


def test_any_flipped_bit_changes_the_digest() -> None:
    page = memory(1)
    before = hash_pages(page, np.array([0]), KEY)
    for byte in range(0, PAGE_SIZE, 97):
        for bit in (1, 128):
            page[0, byte] ^= bit
            assert hash_pages(page, np.array([0]), KEY) != before
            page[0, byte] ^= bit


def test_two_flipped_top_bits_do_not_cancel() -> None:
    page = memory(1)
    before = hash_pages(page, np.array([0]), KEY)
    page[0, [7, 15]] ^= 128
    assert hash_pages(page, np.array([0]), KEY) != before


steps = st.lists(
    st.tuples(st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=20, unique=True), st.integers(0, 2)), max_size=10
)


@settings(max_examples=40, deadline=None)
@given(steps, st.integers(0, PAGES - 1))
def test_roots_speak_of_the_final_versions_and_of_nothing_else(history: list[tuple[list[int], int]], page: int) -> None:
    """Pages that come again, as content or as zero, in any order and in parts, leave what one pass at the end would."""
    pages = memory()
    told = PageDigests(REGIONS, KEY)
    for number, (index, how) in enumerate(history):
        where = np.sort(np.array(index))
        if how:
            pages[where, 0] = number
            told.hash(0, pages, where)
            told.roots()  # asking in between changes nothing
        else:
            pages[where] = 0
            told.zero(0, where)
    final = PageDigests(REGIONS, KEY)
    touched = {p for index, _ in history for p in index}
    for one in touched:
        if pages[one].any():
            final.hash(0, pages, np.array([one]))
    assert told.roots() == final.roots()
    assert told.differing(final.roots()) == []
    pages[page, 9] ^= 4
    final.hash(0, pages, np.array([page]))
    first = page // MIN_RANGE_PAGES * MIN_RANGE_PAGES
    wrong = PageRange(region=0, first=first, count=min(MIN_RANGE_PAGES, PAGES - first))
    assert told.differing(final.roots()) == [wrong]


def test_a_page_that_was_never_sent_is_a_zero_page() -> None:
    silent, told = PageDigests(REGIONS, KEY), PageDigests(REGIONS, KEY)
    told.zero(7, np.array([0, 9]))
    assert silent.roots() == told.roots()


def test_pages_that_changed_places_differ() -> None:
    pages = memory()
    here, there = PageDigests(REGIONS, KEY), PageDigests(REGIONS, KEY)
    here.hash(0, pages, np.array([1, 2]))
    there.hash(0, pages[[0, 2, 1]], np.array([1, 2]))
    assert here.differing(there.roots())


@pytest.mark.parametrize("size", [0, 8, 1 << 20])
def test_roots_of_another_number_all_differ(size: int) -> None:
    told = PageDigests(REGIONS, KEY)
    assert len(told.differing(bytes(size))) == 4


def test_there_are_never_more_roots_than_fit_a_message() -> None:
    for gib in (1, 16, 100, 10_000):
        regions = [Region(id=n, size=(gib << 30) + PAGE_SIZE) for n in range(3)]
        assert sum(-(-r.pages // range_pages(regions)) for r in regions) <= MAX_ROOTS
    assert range_pages(REGIONS) == MIN_RANGE_PAGES


def test_all_memory_is_hashed_but_holes() -> None:
    pages = memory()
    pages[100:200] = 0
    exists = present(PAGES, [(0, 300), (1000, 1), (2990, 10)])
    found = hash_all(pages, 64, exists[64:], KEY)
    expected = np.zeros(PAGES - 64, np.uint64)
    for page in [*range(64, 100), *range(200, 300), 1000, *range(2990, 3000)]:
        expected[page - 64] = hash_pages(pages, np.array([page]), KEY)[0]
    assert np.array_equal(found, expected)


def test_ranges_are_named_and_not_too_many() -> None:
    ranges = [PageRange(region=0, first=n, count=1 + n % 2) for n in range(10)]
    assert named(ranges[:2]) == "page 0 of region 0, pages 1 to 2 of region 0"
    assert named(ranges).endswith("and 2 more")
