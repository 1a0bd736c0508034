"""Pages travel as differences or as wholes: whichever way gets the migration somewhere is kept."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from amig.stages.delta_choice import PATIENCE, PROGRESS, DeltaChoice

SHRINKING = [1_000_000_000 * 7**n // 10**n for n in range(40)]


def told(choice: DeltaChoice, remaining: Iterable[int]) -> list[bool]:
    """Return how the round after each of these travels."""
    ways = []
    for pages in remaining:
        choice.round_ended(pages)
        ways.append(choice.whole)
    return ways


def test_differences_are_kept_for_as_long_as_less_and_less_is_left() -> None:
    assert not any(told(DeltaChoice(), SHRINKING))


def test_a_migration_that_gets_nowhere_with_differences_tries_wholes_and_then_again_differences() -> None:
    ways = told(DeltaChoice(), [1000] * (1 + 3 * PATIENCE))
    assert ways == [False] * PATIENCE + [True] * PATIENCE + [False] * PATIENCE + [True]


def test_wholes_are_kept_where_they_get_somewhere() -> None:
    choice = DeltaChoice()
    told(choice, [2 * SHRINKING[0]] * (1 + PATIENCE))
    assert all(told(choice, SHRINKING))


def test_a_little_less_once_in_a_while_is_luck_and_not_progress() -> None:
    lucky = [1000] * (1 + PATIENCE)
    lucky[PATIENCE // 2] = int(1000 * PROGRESS) + 1
    assert told(DeltaChoice(), lucky)[-1]


@given(st.lists(st.integers(0, 1 << 40), max_size=200))
def test_no_way_is_taken_for_fewer_rounds_than_it_needs_to_show_what_it_can(remaining: list[int]) -> None:
    ways = told(DeltaChoice(), remaining)
    changes = [at for at, (before, after) in enumerate(pairwise(ways)) if before != after]
    assert all(later - earlier >= PATIENCE for earlier, later in pairwise(changes))
