"""Dirty bitmaps as numpy arrays of 64-bit words: bit ``i % 64`` of word ``i // 64`` is page ``i``.

That is the layout of KVM's dirty log on every little-endian machine. All functions work on whole arrays: nothing here
loops in Python over pages or words. A bitmap carries no length in pages; bits past the last page stay zero, and the
functions that could set them take the number of pages.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from amig.memory import WORD_PAGES, Words

Index = npt.NDArray[np.int64]
"""Page numbers, or rows of them."""

ALL: Final = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_ONE: Final = np.uint64(1)
_TOP: Final = np.uint64(63)

LANE_RANGES: Final = 16
"""`cut` works on stretches worth so many ranges side by side; each stretch may end in one range that is not full."""

_FEW_WORDS: Final = 512
_POPCOUNT8: Final = np.array([i.bit_count() for i in range(256)], dtype=np.uint8)


def words_for(pages: int) -> int:
    """Return how many words hold so many pages."""
    return -(-pages // WORD_PAGES)


def tail_mask(pages: int) -> np.uint64:
    """Return the bits that the last word of a bitmap of so many pages may have set."""
    return ALL >> np.uint64(-pages % WORD_PAGES)


def zeros(pages: int) -> Words:
    """Return a bitmap with no page set."""
    return np.zeros(words_for(pages), dtype=np.uint64)


def ones(pages: int) -> Words:
    """Return a bitmap with all of ``pages`` set and nothing past them."""
    words = np.full(words_for(pages), ALL, dtype=np.uint64)
    if pages % WORD_PAGES:
        words[-1] = tail_mask(pages)
    return words


def popcount(words: Words) -> npt.NDArray[np.uint8]:
    """Return the number of set bits of each word."""
    counts: npt.NDArray[np.uint8]
    if hasattr(np, "bitwise_count"):  # numpy 2
        counts = np.bitwise_count(words)
    else:
        by_byte = _POPCOUNT8[np.ascontiguousarray(words).view(np.uint8)].reshape(-1, 8)
        counts = by_byte.sum(axis=1, dtype=np.uint8)
    return counts


def count(words: Words) -> int:
    """Return how many pages are set."""
    if words.size <= _FEW_WORDS:  # a chunk's: one big integer costs less than numpy's calls
        return int.from_bytes(words.tobytes(), "little").bit_count()
    return int(popcount(words).sum(dtype=np.int64))


def any_set(words: Words) -> bool:
    """Return whether any page is set."""
    return bool(words.any())


def cumulative(words: Words) -> Index:
    """Return, for each word, how many pages are set in it and all words before it."""
    return np.cumsum(popcount(words), dtype=np.int64)


def from_pages(pages: npt.ArrayLike, size: int) -> Words:
    """Return a bitmap of ``size`` pages with the given page numbers set; they may repeat, in any order."""
    index = np.asarray(pages, dtype=np.int64)
    words = zeros(size)
    if not index.size:
        return words
    if index.min() < 0 or index.max() >= size:
        raise IndexError(f"a page outside of a bitmap of {size} pages")
    bits = np.left_shift(_ONE, (index & 63).astype(np.uint64))
    np.bitwise_or.at(words, index >> 6, bits)
    return words


def to_pages(words: Words, first: int = 0) -> Index:
    """Return the numbers of all set pages in ascending order, ``first`` being the page of bit 0."""
    if words.size <= _FEW_WORDS and count(words) == words.size * WORD_PAGES:  # a dense chunk: nothing to look for
        return np.arange(first, first + words.size * WORD_PAGES, dtype=np.int64)
    busy = np.flatnonzero(words)
    bits = np.flatnonzero(np.unpackbits(words[busy].view(np.uint8), bitorder="little"))
    pages: Index = (busy[bits >> 6] << 6) + (bits & 63) + first
    return pages


def set_range(words: Words, first: int, count: int) -> None:
    """Set pages ``first`` to ``first + count - 1`` in place; nothing needs to be aligned."""
    if count <= 0:
        return
    head, tail, low, high = _edges(first, count)
    if low == high:
        words[low] |= head & tail
        return
    words[low] |= head
    words[low + 1 : high] = ALL
    words[high] |= tail


def clear_range(words: Words, first: int, count: int) -> None:
    """Clear pages ``first`` to ``first + count - 1`` in place; nothing needs to be aligned."""
    if count <= 0:
        return
    head, tail, low, high = _edges(first, count)
    if low == high:
        words[low] &= ~(head & tail)
        return
    words[low] &= ~head
    words[low + 1 : high] = 0
    words[high] &= ~tail


def mask_range(words: Words, first: int, count: int) -> None:
    """Clear every page outside of ``first`` to ``first + count - 1``, in place."""
    if count <= 0:
        words[:] = 0
        return
    head, tail, low, high = _edges(first, count)
    words[:low] = 0
    words[low] &= head
    words[high] &= tail
    words[high + 1 :] = 0


def extract(words: Words, first: int, count: int, out: Words | None = None) -> Words:
    """Return pages ``first`` to ``first + count - 1`` as a bitmap of their own, page ``first`` at bit 0.

    ``first`` needs no alignment: a slot may start at any page of its region. ``out`` has ``words_for(count)`` words.
    """
    size = words_for(count)
    if out is None:
        out = np.empty(size, dtype=np.uint64)
    if not size:
        return out
    low, shift = divmod(first, WORD_PAGES)
    if not shift:
        np.copyto(out, words[low : low + size])
    else:
        np.right_shift(words[low : low + size], np.uint64(shift), out=out)
        above = words[low + 1 : low + 1 + size]
        out[: above.size] |= above << np.uint64(WORD_PAGES - shift)
    if count % WORD_PAGES:
        out[-1] &= tail_mask(count)
    return out


def spread(words: Words, shift: int, count: int, out: Words | None = None) -> Words:
    """Return the first ``count`` pages of ``words`` moved up by ``shift`` (0 to 63) pages: the reverse of `extract`.

    The result has ``words_for(shift + count)`` words; bits of ``words`` past ``count`` are left out.
    """
    size = words_for(shift + count)
    if out is None:
        out = np.empty(size, dtype=np.uint64)
    if not size:
        return out
    have = words_for(count)
    if not shift:
        np.copyto(out, words[:have])
    else:
        np.left_shift(words[:have], np.uint64(shift), out=out[:have])
        out[have:] = 0
        out[1:] |= words[: size - 1] >> np.uint64(WORD_PAGES - shift)
    if (shift + count) % WORD_PAGES:
        out[-1] &= tail_mask(shift + count)
    return out


def or_into(words: Words, first: int, source: Words, count: int) -> None:
    """Set in ``words``, from page ``first`` on, what the first ``count`` pages of ``source`` have set."""
    low, shift = divmod(first, WORD_PAGES)
    if count > 0:
        words[low : low + words_for(shift + count)] |= spread(source, shift, count)


def remove_from(words: Words, first: int, source: Words, count: int) -> None:
    """Clear in ``words``, from page ``first`` on, what the first ``count`` pages of ``source`` have set."""
    low, shift = divmod(first, WORD_PAGES)
    if count > 0:
        words[low : low + words_for(shift + count)] &= ~spread(source, shift, count)


def store(words: Words, first: int, source: Words, count: int) -> None:
    """Replace pages ``first`` to ``first + count - 1`` of ``words`` by the first ``count`` pages of ``source``."""
    low, shift = divmod(first, WORD_PAGES)
    if count <= 0:
        return
    if not shift and not count % WORD_PAGES:
        np.copyto(words[low : low + count // WORD_PAGES], source[: count // WORD_PAGES])
        return
    clear_range(words, first, count)
    or_into(words, first, source, count)


def cut(
    words: Words, first: int, limit_pages: int, max_span_pages: int | None = None, *, pages: int | None = None
) -> Index:
    """Cut a bitmap into ranges that hold at most ``limit_pages`` set pages each; returns rows (first, count, set).

    Ranges start and end at words with set pages, so empty stretches between them are skipped. They begin at multiples
    of 64, counted from ``first`` (the page of bit 0), and are multiples of 64 long, except that ``pages``, the length
    of the bitmap, ends the last. A single word is never cut: with a limit below 64 it may exceed it. No range crosses
    a multiple of ``max_span_pages`` (rounded up to 64), so one that is given alone makes the fixed ranges of the
    published comparisons. Every range but the last of a stretch of `LANE_RANGES` is as long as the limit allows.

    One call does a whole region: about 50 ms for 1 TiB with a limit of 8 MiB of pages. Where a million ranges or more
    come out, cut parts of the bitmap (``words[a:b]``, ``first + 64 * a``) as they are needed.
    """
    if limit_pages <= 0 or (max_span_pages is not None and max_span_pages <= 0):
        raise ValueError("a limit of no pages")
    used = int(np.count_nonzero(words))
    if not used:
        return np.empty((0, 3), dtype=np.int64)
    # Few words with set pages are looked at alone. Many are cheaper to look at with the empty ones between them.
    busy = np.flatnonzero(words) if used < words.size // 4 else None
    held = popcount(words if busy is None else words[busy])
    if limit_pages % WORD_PAGES == 0 and used == words.size and max_span_pages is None and held.min() == WORD_PAGES:
        return _even(words.size * WORD_PAGES, first, limit_pages, pages)  # the first round: nothing to be searched for
    after = np.empty(held.size + 1, dtype=np.int64)
    after[0] = 0
    np.cumsum(held, out=after[1:])
    all_full = limit_pages % WORD_PAGES == 0 and after[-1] == used * WORD_PAGES
    # Where every word is full the stretch is one range.
    stretch = limit_pages if all_full else limit_pages * LANE_RANGES
    edges = np.searchsorted(after[:-1], np.arange(0, after[-1], stretch))
    if max_span_pages is not None:
        edges = np.concatenate((edges, _grid(words.size, busy, words_for(max_span_pages))))
        edges.sort()
    start = edges[np.diff(edges, prepend=-1) > 0]
    stop = np.append(start[1:], held.size)
    heads = [start]
    while True:
        more = np.flatnonzero(after[stop] - after[start] > limit_pages)
        start, stop = start[more], stop[more]
        if not start.size:
            break
        reach = np.searchsorted(after, after[start] + limit_pages, side="right") - 1
        start = np.maximum(reach, start + 1)
        inside = start < stop
        start, stop = start[inside], stop[inside]
        heads.append(start)
    head = np.concatenate(heads)
    head.sort()
    end = np.append(head[1:], held.size)
    held_any = after[end] > after[head]
    before, behind = after[head[held_any]], after[end[held_any]]
    # From the first word with a set page to the last one.
    low, high = np.searchsorted(after, before, side="right") - 1, np.searchsorted(after, behind) - 1
    if busy is not None:
        low, high = busy[low], busy[high]
    rows = np.empty((low.size, 3), dtype=np.int64)
    rows[:, 0] = low << 6
    rows[:, 1] = (high + 1 - low) << 6
    rows[:, 2] = behind - before
    if pages is not None:
        rows[-1, 1] = min(rows[-1, 1], pages - rows[-1, 0])
    rows[:, 0] += first
    return rows


def _grid(size: int, busy: Index | None, span: int) -> Index:
    """Return where, of ``size`` words or of those in ``busy``, a new multiple of ``span`` words begins."""
    if busy is None:
        return np.arange(0, size, span)
    return np.flatnonzero(np.diff(busy // span)) + 1


def _even(size: int, first: int, limit_pages: int, pages: int | None) -> Index:
    """`cut` for ``size`` pages that are all set."""
    rows = np.empty((-(-size // limit_pages), 3), dtype=np.int64)
    rows[:, 0] = np.arange(0, size, limit_pages)
    rows[:, 1:] = limit_pages
    last = size - int(rows[-1, 0])
    rows[-1, 1:] = last
    if pages is not None:
        rows[-1, 1] = min(last, pages - int(rows[-1, 0]))
    rows[:, 0] += first
    return rows


def runs(words: Words, first: int = 0) -> tuple[Index, Index]:
    """Return first pages and lengths of all runs of consecutive set pages, ``first`` being the page of bit 0."""
    before = words << _ONE
    before[1:] |= words[:-1] >> _TOP
    starts = to_pages(words & ~before, first)
    behind = words >> _ONE
    behind[:-1] |= words[1:] << _TOP
    lasts = to_pages(words & ~behind, first)
    return starts, lasts - starts + 1


def _edges(first: int, count: int) -> tuple[np.uint64, np.uint64, int, int]:
    """Return the masks of the first and last word of a range, and their indexes."""
    end = first + count
    return ALL << np.uint64(first % WORD_PAGES), tail_mask(end), first // WORD_PAGES, (end - 1) // WORD_PAGES
