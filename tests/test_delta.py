"""Pages that are sent again travel as their difference, and the destination has the same memory all the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from amig.memory import PAGE_SIZE, Pages, Region
from amig.stages.delta import NOWHERE, SentPages

PAGES = 24
REGIONS = (Region(id=0, size=PAGES * PAGE_SIZE), Region(id=7, size=PAGES * PAGE_SIZE))


def pages(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(sorted(numbers), np.int64)


def filled(*values: int) -> Pages:
    return np.repeat(np.array(values, np.uint8), PAGE_SIZE).reshape(-1, PAGE_SIZE)


def test_the_difference_brings_the_old_version_to_the_new_one() -> None:
    sent = SentPages(REGIONS, 1 << 30)
    first, second = filled(1, 2, 3), filled(1, 9, 3)
    places = sent.find(0, pages(4, 5, 9), 0)
    assert not places.known.any()
    sent.store(places.slots, first)
    again = sent.find(0, pages(4, 5, 9), 1)
    assert again.known.all()
    difference = sent.exchange(again.slots, second, np.empty_like(second))
    assert ((first ^ difference) == second).all()
    assert not difference[0].any(), "what has not changed differs in nothing"


def test_a_cache_takes_no_more_than_it_may_and_says_whether_all_memory_fits() -> None:
    small = SentPages(REGIONS, 10 * PAGE_SIZE)
    assert (small.capacity, small.roomy) == (10, False)
    assert (small.find(0, pages(*range(PAGES)), 0).slots != NOWHERE).sum() == 10
    assert SentPages(REGIONS, 1 << 40).roomy


def test_what_was_not_sent_lately_makes_room_for_what_is() -> None:
    sent = SentPages(REGIONS, 4 * PAGE_SIZE)
    sent.find(0, pages(0, 1, 2, 3), 1)
    assert (sent.find(0, pages(10), 2).slots == NOWHERE).all(), "they were sent just the round before"
    sent.find(0, pages(0, 1), 2)
    assert (sent.find(0, pages(10, 11, 12), 3).slots != NOWHERE).sum() == 2
    assert sent.find(0, pages(0, 1, 2, 3), 3).known.tolist() == [True, True, False, False]


def test_what_was_forgotten_makes_room_before_what_is_cold() -> None:
    sent = SentPages(REGIONS, 4 * PAGE_SIZE)
    sent.find(0, pages(0, 1, 2, 3), 0)
    sent.forget(0, pages(2, 3))
    assert sent.find(0, pages(3, 4), 5).known.tolist() == [False, False]
    assert sent.find(0, pages(0, 1, 3, 4), 5).known.all(), "those that are not sent again for long are kept"


class Versions(RuleBasedStateMachine):
    """What the cache calls known is what the destination has, whatever is sent, zeroed, remembered and evicted."""

    @initialize(capacity=st.integers(1, 2 * PAGES))
    def begin(self, capacity: int) -> None:
        self.sent = SentPages(REGIONS, capacity * PAGE_SIZE)
        self.round = 0
        self.here = {region.id: np.zeros((PAGES, PAGE_SIZE), np.uint8) for region in REGIONS}
        self.there = {region.id: np.zeros((PAGES, PAGE_SIZE), np.uint8) for region in REGIONS}
        self.gone: set[tuple[int, int]] = set()

    @rule()
    def next_round(self) -> None:
        self.round += 1
        self.gone.clear()

    @rule(
        region=st.sampled_from((0, 7)),
        wanted=st.sets(st.integers(0, PAGES - 1), min_size=1, max_size=6),
        value=st.integers(0, 255),
    )
    def send(self, region: int, wanted: set[int], value: int) -> None:
        index = pages(*(page for page in wanted if (region, page) not in self.gone))
        self.gone |= {(region, page) for page in wanted}
        if not len(index):
            return
        self.here[region][index] = value
        if not value:
            self.sent.forget(region, index)
            self.there[region][index] = 0
            return
        content = self.here[region][index]
        places = self.sent.find(region, index, self.round)
        news = ~places.known & (places.slots != NOWHERE)
        self.sent.store(places.slots[news], content[news])
        known = places.known
        old = np.empty((PAGES, PAGE_SIZE), np.uint8)
        self.there[region][index[known]] ^= self.sent.exchange(places.slots[known], content[known], old)
        self.there[region][index[~known]] = content[~known]

    @invariant()
    def both_sides_are_equal(self) -> None:
        for region in getattr(self, "here", ()):
            assert (self.here[region] == self.there[region]).all()


TestVersions = pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")(Versions.TestCase)
TestVersions.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
