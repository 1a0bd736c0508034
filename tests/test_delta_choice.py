"""Pages travel as differences or as wholes: whichever way leaves less to be sent is kept."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from amig.stages.delta_choice import PATIENCE, PROGRESS, TRIAL, WEARY, DeltaChoice

SHRINKING = [1_000_000_000 * 7**n // 10**n for n in range(40)]
STUCK = [2_000_000_000] * (1 + PATIENCE)
"""After these, the other way is tried."""


def told(choice: DeltaChoice, remaining: Iterable[int]) -> list[bool]:
    """Return how the round after each of these travels."""
    ways = []
    for pages in remaining:
        choice.round_ended(pages)
        ways.append(choice.whole)
    return ways


def test_differences_are_kept_for_as_long_as_less_and_less_is_left() -> None:
    assert not any(told(DeltaChoice(), SHRINKING))


def test_a_migration_that_gets_nowhere_with_differences_tries_wholes() -> None:
    ways = told(DeltaChoice(), STUCK)
    assert ways == [False] * PATIENCE + [True]


def test_wholes_are_kept_where_they_leave_less() -> None:
    choice = DeltaChoice()
    told(choice, STUCK)
    assert all(told(choice, SHRINKING))


def test_a_trial_that_leaves_as_much_is_over_soon_and_the_next_one_far_away() -> None:
    choice = DeltaChoice()
    told(choice, STUCK)
    assert told(choice, STUCK[:TRIAL]) == [True] * (TRIAL - 1) + [False]
    assert told(choice, STUCK[:1] * (1 + WEARY * PATIENCE)) == [False] * WEARY * PATIENCE + [True]


def test_a_trial_that_leaves_a_little_less_may_have_been_lucky() -> None:
    choice = DeltaChoice()
    told(choice, STUCK)
    assert not told(choice, [int(STUCK[0] * PROGRESS) + 1] * TRIAL)[-1]


def test_what_the_way_before_has_left_does_not_count_in_a_trial() -> None:
    choice = DeltaChoice()
    told(choice, STUCK)
    half = TRIAL // 2
    assert told(choice, [100 * STUCK[0]] * half + [STUCK[0] // 2] * half)[-1]


def test_a_little_less_once_in_a_while_is_luck_and_not_progress() -> None:
    lucky = list(STUCK)
    lucky[PATIENCE // 2] = int(STUCK[0] * PROGRESS) + 1
    assert told(DeltaChoice(), lucky)[-1]


@given(st.lists(st.integers(50, 100), min_size=150, max_size=300))
def test_no_way_is_taken_for_fewer_rounds_than_it_needs_to_show_what_it_can(remaining: list[int]) -> None:
    """So little less is left at best that the other way is tried sooner or later, and more than once."""
    ways = told(DeltaChoice(), remaining)
    changes = [at for at, (before, after) in enumerate(pairwise(ways)) if before != after]
    assert changes
    assert all(later - earlier >= TRIAL for earlier, later in pairwise(changes))
