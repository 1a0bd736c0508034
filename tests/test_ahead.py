"""The destination's memory is backed ahead of the pages that come in a row, and no more of it than is needed."""

from __future__ import annotations

import threading

import numpy as np

from amig import bitmap
from amig.errors import HostError
from amig.memory import PAGE_SIZE, Region
from amig.stages.ahead import AHEAD_PAGES, STEP_PAGES, BackingAhead

PAGES = 4 * AHEAD_PAGES
REGIONS = (Region(id=0, size=PAGES * PAGE_SIZE), Region(id=1, size=PAGES * PAGE_SIZE))


class Kernel:
    """Backs memory when it is told that it may."""

    def __init__(self, *, needed: bool = True, fails: bool = False) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.go = threading.Event()
        self.go.set()
        self.needed = needed
        self.fails = fails

    def populate(self, region: int, first: int, count: int) -> bool:
        assert self.go.wait(30)
        self.calls.append((region, first, count))
        if self.fails:
            raise HostError("no memory left")
        return self.needed


async def test_what_follows_a_run_is_backed_and_counts_as_backed_at_once() -> None:
    kernel = Kernel()
    kernel.go.clear()
    ahead = BackingAhead(REGIONS, kernel.populate)
    ahead.came(0, 0, 512)
    fresh = bitmap.ones(512)
    assert not ahead.missing(0, 512, fresh).any()
    assert ahead.missing(0, 0, fresh).all()
    assert ahead.missing(1, 512, fresh).all()
    kernel.go.set()
    backed = await ahead.backed()
    assert kernel.calls == [(0, 512, STEP_PAGES)]
    assert bitmap.to_pages(backed[0]).tolist() == list(range(512, 512 + STEP_PAGES))
    ahead.close()


async def test_it_never_gets_further_ahead_than_the_limit_nor_past_the_end_nor_backs_twice() -> None:
    kernel = Kernel()
    ahead = BackingAhead(REGIONS, kernel.populate)
    for end in [512] * 20 + [1024] * 20 + [PAGES - 100] * 3:
        ahead.came(0, end - 512, end)
        await ahead.backed()
    ahead.close()
    index = np.concatenate([np.arange(first, first + count) for _, first, count in kernel.calls])
    assert len(np.unique(index)) == len(index)
    assert index.max() == PAGES - 1
    assert index[index < PAGES // 2].max() == 1024 + AHEAD_PAGES - 1


async def test_while_one_call_is_under_way_no_other_is_made() -> None:
    kernel = Kernel()
    kernel.go.clear()
    ahead = BackingAhead(REGIONS, kernel.populate)
    for end in range(512, 5120, 512):
        ahead.came(0, end - 512, end)
    kernel.go.set()
    await ahead.backed()
    assert len(kernel.calls) == 1
    ahead.close()


async def test_memory_that_is_backed_already_is_left_alone_for_good() -> None:
    kernel = Kernel(needed=False)
    ahead = BackingAhead(REGIONS, kernel.populate)
    ahead.came(0, 0, 512)
    assert await ahead.backed() == {}, "nothing that could be given back"
    ahead.came(0, 512, 1024)
    assert await ahead.backed() == {}
    assert len(kernel.calls) == 1
    ahead.close()


async def test_no_memory_left_is_for_those_to_say_who_need_the_pages() -> None:
    ahead = BackingAhead(REGIONS, Kernel(fails=True).populate)
    ahead.came(0, 0, 512)
    await ahead.backed()
    ahead.close()
