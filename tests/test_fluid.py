"""The fluid limit against a guest and a link that are played through step by step."""

from __future__ import annotations

import math
import random

import pytest

from amig.errors import UsageError
from amig.fluid import Flow, pages_sent, seconds

GB = 1e9 / 4096


def played(flow: Flow, steps: int = 400) -> float:
    """Return the time of a migration that sends dirty pages at random, a small step at a time.

    ``steps`` a working set's time on the link; sends and writes alternate page by page.
    """
    rng = random.Random(1)
    pages = int(flow.working_set)
    dirty = list(range(pages))
    where = {page: at for at, page in enumerate(dirty)}
    now = (flow.memory - flow.working_set) / flow.link
    owed = 0.0
    while len(dirty) > flow.link * flow.downtime:
        at = rng.randrange(len(dirty))
        page, last = dirty[at], dirty[-1]
        dirty[at], where[last] = last, at
        dirty.pop()
        del where[page]
        now += 1 / flow.link
        owed += flow.dirty_rate / flow.link
        while owed >= 1:
            owed -= 1
            page = rng.randrange(pages)
            if page not in where:
                where[page] = len(dirty)
                dirty.append(page)
    return now + len(dirty) / flow.link


@pytest.mark.parametrize("dirty", [0.2, 0.5, 0.72, 0.9])
@pytest.mark.parametrize("downtime", [0.01, 0.1])
def test_a_simulated_migration_takes_as_long_as_the_limit_says(dirty: float, downtime: float) -> None:
    flow = Flow(memory=13_000, working_set=10_000, dirty_rate=dirty * 10_000, link=10_000, downtime=downtime)
    assert played(flow) == pytest.approx(seconds(flow), rel=0.04)


def test_the_published_case_at_a_tenth() -> None:
    """Design, section 1: 1.5 s with the rest of memory zero, 1.75 s when it is not."""
    working_set = (1 << 30) / 4096
    bare = Flow(memory=working_set, working_set=working_set, dirty_rate=0.9 * GB, link=1.25 * GB, downtime=0.01)
    assert seconds(bare) == pytest.approx(1.5, abs=0.03)
    whole = Flow(memory=1.3 * working_set, working_set=working_set, dirty_rate=0.9 * GB, link=1.25 * GB, downtime=0.01)
    assert seconds(whole) == pytest.approx(1.75, abs=0.03)


def test_five_per_cent_less_link_costs_more_than_that() -> None:
    working_set = (1 << 30) / 4096
    full, less = (
        Flow(memory=working_set, working_set=working_set, dirty_rate=0.9 * GB, link=share * 1.25 * GB, downtime=0.01)
        for share in (1.0, 0.95)
    )
    assert seconds(less) / seconds(full) == pytest.approx(1.11, abs=0.02)


def test_what_never_fits_takes_for_ever() -> None:
    assert seconds(Flow(memory=1e5, working_set=1e5, dirty_rate=2e4, link=1e4, downtime=0.01)) == math.inf


def test_a_downtime_that_holds_it_all_needs_no_round() -> None:
    assert seconds(Flow(memory=2000, working_set=1000, dirty_rate=5000, link=10_000, downtime=0.1)) == 0.2


def test_nobody_writes() -> None:
    flow = Flow(memory=2000, working_set=1000, dirty_rate=0, link=10_000, downtime=0.01)
    assert (seconds(flow), pages_sent(flow)) == (0.2, 2000)


def test_a_guest_that_writes_little_needs_as_long_as_one_that_does_not() -> None:
    almost = Flow(memory=1000, working_set=1000, dirty_rate=1e-3, link=10_000, downtime=0)
    assert seconds(almost) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    "wrong", [{"link": 0}, {"memory": 1}, {"working_set": -1}, {"dirty_rate": -1}, {"downtime": -0.1}]
)
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    sane = {"memory": 2000, "working_set": 1000, "dirty_rate": 10, "link": 100, "downtime": 0.1}
    with pytest.raises(UsageError):
        Flow(**(sane | wrong))
