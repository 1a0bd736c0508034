"""Bitmaps do what sets of page numbers do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amig import bitmap
from amig.memory import Words

MAX = 400
sizes = st.integers(1, MAX)


@st.composite
def page_sets(draw: st.DrawFn, size: int | None = None) -> tuple[int, set[int]]:
    """A bitmap's size and its set pages: sparse, dense, or made of runs."""
    size = size or draw(sizes)
    pages = draw(st.sets(st.integers(0, size - 1)))
    for _ in range(draw(st.integers(0, 3))):
        first = draw(st.integers(0, size - 1))
        pages |= set(range(first, min(size, first + draw(st.integers(1, 200)))))
    if draw(st.booleans()):
        pages = set(range(size)) - pages
    return size, pages


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, set[int], int, int]:
    size, pages = draw(page_sets())
    first = draw(st.integers(0, size - 1))
    return size, pages, first, draw(st.integers(0, size - first))


def make(size: int, pages: set[int]) -> Words:
    return bitmap.from_pages(sorted(pages), size)


def as_set(words: Words) -> set[int]:
    return {i for i in range(words.size * 64) if int(words[i // 64]) >> (i % 64) & 1}


@settings(deadline=None)
@given(page_sets())
def test_pages_go_in_and_come_out(case: tuple[int, set[int]]) -> None:
    size, pages = case
    words = make(size, pages)
    assert words.size == bitmap.words_for(size)
    assert as_set(words) == pages
    assert bitmap.to_pages(words).tolist() == sorted(pages)
    assert bitmap.to_pages(words, 1000).tolist() == [page + 1000 for page in sorted(pages)]
    assert bitmap.count(words) == len(pages)
    assert bitmap.any_set(words) == bool(pages)
    assert bitmap.popcount(words).tolist() == [len([p for p in pages if p // 64 == w]) for w in range(words.size)]
    assert bitmap.cumulative(words).tolist() == [len([p for p in pages if p // 64 <= w]) for w in range(words.size)]


def test_popcount_without_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(1).integers(0, 2**64, 100, dtype=np.uint64)
    expected = [int(word).bit_count() for word in words]
    assert bitmap.popcount(words).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert bitmap.popcount(words).tolist() == expected
    assert bitmap.popcount(words[::2]).tolist() == expected[::2]


@settings(deadline=None)
@given(sizes)
def test_ones_set_nothing_past_the_end(size: int) -> None:
    assert as_set(bitmap.ones(size)) == set(range(size))
    assert as_set(bitmap.zeros(size)) == set()
    assert bitmap.ones(size).size == bitmap.zeros(size).size == -(-size // 64)


def test_a_page_outside_is_refused() -> None:
    with pytest.raises(IndexError):
        bitmap.from_pages([10], 10)
    with pytest.raises(IndexError):
        bitmap.from_pages([-1], 10)


@settings(deadline=None)
@given(ranges())
def test_ranges_need_no_alignment(case: tuple[int, set[int], int, int]) -> None:
    size, pages, first, count = case
    inside = set(range(first, first + count))
    words = make(size, pages)
    bitmap.set_range(words, first, count)
    assert as_set(words) == pages | inside
    words = make(size, pages)
    bitmap.clear_range(words, first, count)
    assert as_set(words) == pages - inside
    words = make(size, pages)
    bitmap.mask_range(words, first, count)
    assert as_set(words) == pages & inside


@settings(deadline=None)
@given(ranges())
def test_extract_moves_a_range_to_bit_0(case: tuple[int, set[int], int, int]) -> None:
    size, pages, first, count = case
    expected = {page - first for page in pages if first <= page < first + count}
    words = make(size, pages)
    assert as_set(bitmap.extract(words, first, count)) == expected
    out = np.full(bitmap.words_for(count), bitmap.ALL)
    assert bitmap.extract(words, first, count, out) is out
    assert as_set(out) == expected
    assert as_set(words) == pages


@settings(deadline=None)
@given(page_sets(), st.integers(0, 63), st.data())
def test_spread_is_the_reverse_of_extract(case: tuple[int, set[int]], shift: int, data: st.DataObject) -> None:
    size, pages = case
    count = data.draw(st.integers(0, size))
    moved = bitmap.spread(make(size, pages), shift, count)
    assert as_set(moved) == {page + shift for page in pages if page < count}
    assert moved.size == bitmap.words_for(shift + count)
    out = np.full(moved.size, bitmap.ALL)
    assert as_set(bitmap.spread(make(size, pages), shift, count, out)) == as_set(moved)


@settings(deadline=None)
@given(ranges(), st.data())
def test_a_range_is_merged_removed_or_replaced(case: tuple[int, set[int], int, int], data: st.DataObject) -> None:
    size, pages, first, count = case
    other_size, other = data.draw(page_sets(size=count + data.draw(st.integers(1, 80))))
    source = make(other_size, other)
    moved = {page + first for page in other if page < count}
    for function, expected in (
        (bitmap.or_into, pages | moved),
        (bitmap.remove_from, pages - moved),
        (bitmap.store, (pages - set(range(first, first + count))) | moved),
    ):
        words = make(size, pages)
        function(words, first, source, count)
        assert as_set(words) == expected, function.__name__
    assert as_set(source) == other


@settings(deadline=None)
@given(page_sets(), st.integers(0, 100))
def test_runs_are_maximal(case: tuple[int, set[int]], first: int) -> None:
    size, pages = case
    expected = []
    for page in sorted(pages):
        if page - 1 not in pages:
            length = 1
            while page + length in pages:
                length += 1
            expected.append((page + first, length))
    starts, lengths = bitmap.runs(make(size, pages), first)
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == expected


@st.composite
def cut_cases(draw: st.DrawFn) -> tuple[int, set[int], int, int | None]:
    kind = draw(st.sampled_from(["any", "big", "full"]))
    if kind == "any":
        size, pages = draw(page_sets())
    else:
        size = draw(st.integers(1, 6000))
        if kind == "full":
            pages = set(range(size))
        else:
            rng = np.random.default_rng(draw(st.integers(0, 100)))
            density = 10.0 ** -draw(st.floats(0, 4))  # few words with a page in them are another way than many
            pages = set(np.flatnonzero(rng.random(size) < density).tolist())
    limit = draw(st.one_of(st.integers(1, 300), st.sampled_from([64, 128, 256, 1 << 40])))
    return size, pages, limit, draw(st.one_of(st.none(), st.integers(1, 1000)))


@settings(deadline=None)
@given(cut_cases())
def test_cut_keeps_its_promises(case: tuple[int, set[int], int, int | None]) -> None:
    size, pages, limit, span = case
    words = make(size, pages)
    rows = bitmap.cut(words, 6400, limit, span, pages=size).tolist()
    covered: set[int] = set()
    for first, count, dirty in rows:
        first -= 6400
        inside = pages & set(range(first, first + count))
        assert dirty == len(inside) > 0
        assert dirty <= max(limit, 64)
        assert dirty <= limit or count <= 64, "only a single word may exceed the limit"
        assert first % 64 == 0
        assert count % 64 == 0 or first + count == size
        assert first + count <= size
        assert pages & set(range(first, first + 64)), "starts at a word with dirty bits"
        assert pages & set(range((first + count - 1) // 64 * 64, first + count)), "ends at one"
        if span is not None:
            grid = -(-span // 64) * 64
            assert first // grid == (first + count - 1) // grid
        assert not covered & inside
        assert not covered or max(covered) < first
        covered |= inside
    assert covered == pages


@settings(deadline=None)
@given(page_sets(), st.integers(64, 300))
def test_cut_fills_ranges_as_far_as_the_limit_allows(case: tuple[int, set[int]], limit: int) -> None:
    size, pages = case
    greedy = 0
    room = 0
    for word in range(bitmap.words_for(size)):
        here = len([page for page in pages if page // 64 == word])
        if here > room:
            greedy += 1
            room = limit
        room -= here
    # All of it is less than one stretch, so it is exactly greedy.
    assert len(pages) <= limit * bitmap.LANE_RANGES
    assert len(bitmap.cut(make(size, pages), 0, limit)) == greedy


def test_cut_of_a_full_bitmap_gives_full_ranges() -> None:
    rows = bitmap.cut(bitmap.ones(64 * 1000), 0, 256, pages=64 * 1000)
    assert rows.tolist() == [[i * 256, 256, 256] for i in range(250)]


@given(words=st.integers(1, 50), limit=st.integers(1, 9), first=st.integers(0, 3))
def test_a_full_bitmap_is_cut_as_one_with_a_page_missing_but_for_that_page(words: int, limit: int, first: int) -> None:
    pages = words * 64
    almost = bitmap.ones(pages)
    bitmap.clear_range(almost, pages - 1, 1)
    rows, others = (bitmap.cut(bits, first * 64, limit * 64, pages=pages) for bits in (bitmap.ones(pages), almost))
    assert rows[:, :2].tolist() == others[:, :2].tolist()
    assert rows[:, 2].sum() == pages == others[:, 2].sum() + 1


def test_cut_of_nothing_is_nothing_and_a_limit_of_nothing_is_refused() -> None:
    assert bitmap.cut(bitmap.zeros(1000), 0, 10).shape == (0, 3)
    assert bitmap.cut(np.empty(0, dtype=np.uint64), 0, 10).shape == (0, 3)
    for limit, span in ((0, None), (-1, None), (1, 0)):
        with pytest.raises(ValueError, match="limit"):
            bitmap.cut(bitmap.ones(10), 0, limit, span)


def test_a_bitmap_of_a_tebibyte_is_cut_in_one_go() -> None:
    """32 MiB of words: milliseconds in numpy, minutes in Python, which the suite's time limit would end."""
    pages = (1 << 40) // 4096
    words = bitmap.ones(pages)
    assert len(bitmap.cut(words, 0, 2048, pages=pages)) == pages // 2048
    starts, lengths = bitmap.runs(words)
    assert (starts.tolist(), lengths.tolist()) == ([0], [pages])
