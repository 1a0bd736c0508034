"""How far a migration is: never backwards, and the first pass is the first pass over however many connections."""

from __future__ import annotations

from amig.events import State
from amig.policy import Convergence, Limits, Policy
from amig.session.progress import ProgressMeter
from amig.stats import MigrationStats

PAGES = 1000


def meter() -> tuple[ProgressMeter, MigrationStats]:
    stats = MigrationStats(pages_total=PAGES)
    stats.link.begin(0)
    stats.link.end(1_000_000_000, 1 << 30)
    policy = Policy()
    return ProgressMeter(stats, Convergence(policy=policy, limits=Limits.of(policy)), lambda _: None), stats


def test_the_first_pass_is_most_of_the_way() -> None:
    shown, stats = meter()
    shown.round_started(0, PAGES, first_pass=True)
    stats.pages_sent = PAGES // 2
    half = shown.now(State.MEMORY)
    assert half.fraction == 0.45
    assert half.waiting_for == "the first pass over memory"


def test_after_a_connection_was_lost_early_it_is_still_the_first_pass() -> None:
    shown, stats = meter()
    shown.round_started(0, PAGES, first_pass=True)
    stats.pages_sent = 50
    before = shown.now(State.MEMORY).fraction
    shown.round_started(2, PAGES - 50, first_pass=True)
    again = shown.now(State.MEMORY)
    assert before <= again.fraction < 0.1
    assert again.waiting_for == "the first pass over memory"


def test_it_never_runs_backwards() -> None:
    shown, stats = meter()
    shown.round_started(0, PAGES, first_pass=True)
    stats.pages_sent = PAGES
    whole = shown.now(State.MEMORY).fraction
    shown.round_started(1, PAGES, first_pass=False)
    assert shown.now(State.MEMORY).fraction >= whole
