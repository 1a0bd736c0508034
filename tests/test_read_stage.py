"""Reading chunks into blocks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig import bitmap
from amig.memory import MemoryMap, Region, Slot
from amig.stages.gather import zero_pages
from amig.stages.items import Chunk, Extent
from amig.stages.read import ChunkReader
from amig.stages.scan import WORTH_WORDS, Scanner
from amig.stats import MigrationStats

PAGES = 256


class Memory:
    """A region of pages that are not zero."""

    def __init__(self) -> None:
        size = PAGES * 4096
        self.map = MemoryMap(
            generation=1,
            regions=(Region(id=0, size=size),),
            slots=(Slot(index=0, guest_phys=0, size=size, region=0, offset=0),),
        )
        self._pages = np.full((PAGES, 4096), 7, np.uint8)

    def pages(self, region: int) -> np.ndarray:
        return self._pages

    def data_ranges(self, region: int, first: int, count: int) -> list[tuple[int, int]]:
        return [(first, count)]


def test_a_block_keeps_its_bits_when_the_host_takes_the_same_range_again() -> None:
    """The words of a take lie in memory that the host writes at the next one; a block may still wait for its link."""
    words = bitmap.ones(PAGES)
    chunk = Chunk(extent=Extent(round=0, region=0, first=0, count=PAGES, dirty=PAGES), words=words, cleared_ns=1)
    [block] = ChunkReader(Memory(), MigrationStats(pages_total=PAGES)).blocks(chunk)
    assert block.data_pages == bitmap.count(block.pages) == PAGES
    words[:] = 1
    assert bitmap.count(block.pages) == PAGES


@pytest.mark.parametrize("at", [None, 0, WORTH_WORDS // 2 - 1, WORTH_WORDS // 2, WORTH_WORDS - 1])
def test_one_bit_in_either_half_of_a_long_run_is_seen(at: int | None) -> None:
    words = np.zeros(WORTH_WORDS, np.uint64)
    if at is not None:
        words[at] = 1
    scanner = Scanner()
    try:
        assert scanner.all_zero(words) is (at is None)
        assert scanner.all_zero(words[: WORTH_WORDS - 1]) is (at in (None, WORTH_WORDS - 1))
    finally:
        scanner.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("amig-scan")]


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 4095), st.integers(1, 255)), max_size=6), st.booleans())
def test_a_page_is_zero_when_all_of_its_bytes_are(written: list[tuple[int, int, int]], scattered: bool) -> None:
    """Wherever the only byte lies that is not: the first words of all pages may be zero, and most of the rest."""
    memory = np.zeros((64, 4096), np.uint8)
    for page, at, value in written:
        memory[page, at] = value
    index = np.arange(0, 64, 2 if scattered else 1, dtype=np.int64)
    assert zero_pages(memory, index).tolist() == [not memory[page].any() for page in index.tolist()]
