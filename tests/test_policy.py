"""When a guest is moved: the decision after every round, as pure arithmetic."""

from __future__ import annotations

import pytest

from amig.errors import UsageError
from amig.policy import FIXED, MIB, Convergence, Limits, Policy, Verdict

GIB = 1 << 30


def convergence(**more: object) -> Convergence:
    policy = Policy(**{"downtime": 0.1, "max_rounds": 10, **more})  # type: ignore[arg-type]
    return Convergence(policy=policy, limits=Limits.of(policy))


def test_it_switches_when_the_rest_fits_the_downtime_limit() -> None:
    judge = convergence().judge
    fits = int((0.1 - FIXED) * GIB)
    assert judge(rounds=1, remaining_bytes=fits, rate=GIB, elapsed=1) is Verdict.SWITCH
    assert judge(rounds=1, remaining_bytes=fits * 1.01, rate=GIB, elapsed=1) is Verdict.GO_ON


def test_the_fixed_part_counts_against_the_limit() -> None:
    decision = convergence()
    decision.measured(round_trip=0.01, record=0.02)
    assert decision.downtime(0, GIB) == pytest.approx(min(FIXED + 0.04, 0.05))
    assert decision.judge(rounds=1, remaining_bytes=0.06 * GIB, rate=GIB, elapsed=1) is Verdict.GO_ON


def test_a_disk_that_was_slow_once_does_not_put_the_limit_out_of_reach() -> None:
    decision = convergence()
    decision.measured(round_trip=0.01, record=5.0)
    assert decision.judge(rounds=1, remaining_bytes=0.04 * GIB, rate=GIB, elapsed=1) is Verdict.SWITCH


def test_a_limit_shorter_than_the_fixed_part_is_tried_for_all_the_same() -> None:
    decision = convergence(downtime=FIXED / 2)
    assert decision.overrun == pytest.approx(FIXED - FIXED / 4), "and by how much it may be exceeded is known"
    assert convergence().overrun == 0
    assert decision.judge(rounds=1, remaining_bytes=FIXED / 5 * GIB, rate=GIB, elapsed=1) is Verdict.SWITCH
    assert decision.judge(rounds=1, remaining_bytes=FIXED / 3 * GIB, rate=GIB, elapsed=1) is Verdict.GO_ON


def test_an_idle_guest_switches_at_once_even_when_nothing_is_known_of_the_link() -> None:
    assert convergence().judge(rounds=1, remaining_bytes=0, rate=0, elapsed=0) is Verdict.SWITCH


def test_a_link_that_was_slow_at_first_is_believed_in_again_by_small_rounds() -> None:
    decision = convergence()
    decision.round_took(GIB, 100.0)
    for _ in range(12):
        decision.round_took(4 * MIB, 4 * MIB / GIB)
    assert decision.rate(GIB) > 0.9 * GIB


def test_a_small_round_that_was_slow_says_nothing_about_the_pace() -> None:
    decision = convergence()
    decision.round_took(GIB, 1.0)
    decision.round_took(4 * MIB, 1.0)
    assert decision.rate(GIB) == GIB


def test_a_fast_link_is_no_help_when_rounds_go_slowly() -> None:
    decision = convergence()
    decision.round_took(GIB, 4.0)
    assert decision.rate(GIB) == GIB / 4
    decision.round_took(GIB, 1.0)
    assert GIB / 4 < decision.rate(GIB) < GIB


def test_what_a_link_carried_after_a_rest_is_no_promise_beyond_what_the_operator_allows() -> None:
    decision = convergence(bandwidth=GIB / 4)
    assert decision.rate(GIB) == GIB / 4
    assert decision.rate(GIB / 8) == GIB / 8
    assert decision.rate(GIB, gain=2.0) == GIB / 2, "compressed, twice as much memory in the same bytes"
    decision.limits.bandwidth = None
    assert decision.rate(GIB) == GIB


def test_the_pace_of_a_tiny_round_is_not_counted() -> None:
    decision = convergence()
    decision.round_took(MIB, 1.0)
    assert decision.rate(GIB) == GIB


@pytest.mark.parametrize(("on_timeout", "verdict"), [("cancel", Verdict.GIVE_UP), ("switch", Verdict.FORCE)])
def test_at_a_limit_the_operator_has_the_say(on_timeout: str, verdict: Verdict) -> None:
    by_rounds = convergence(on_timeout=on_timeout)
    assert by_rounds.judge(rounds=10, remaining_bytes=GIB, rate=GIB, elapsed=1) is verdict
    by_time = convergence(on_timeout=on_timeout, timeout=5.0)
    assert by_time.judge(rounds=1, remaining_bytes=GIB, rate=GIB, elapsed=5) is verdict
    assert by_time.judge(rounds=1, remaining_bytes=GIB, rate=GIB, elapsed=4.9) is Verdict.GO_ON


def test_a_limit_changed_in_flight_counts_from_the_next_decision() -> None:
    decision = convergence()
    assert decision.judge(rounds=1, remaining_bytes=GIB, rate=GIB, elapsed=1) is Verdict.GO_ON
    decision.limits.downtime = 2.0
    assert decision.judge(rounds=2, remaining_bytes=GIB, rate=GIB, elapsed=1) is Verdict.SWITCH


@pytest.mark.parametrize(
    "wrong",
    [
        {"bandwidth": 10},
        {"downtime": 0},
        {"max_rounds": 0},
        {"timeout": -1},
        {"on_timeout": "hope"},
        {"chunk": 1 << 17},
        {"chunk": 1 << 31},
        {"chunk_span": 4096},
        {"compression": "rot13"},
        {"level": 0},
        {"workers": 0},
        {"streams": 65},
        {"connect_timeout": 0},
    ],
    ids=str,
)
def test_a_policy_that_makes_no_sense_says_so(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="the policy asks for"):
        Policy(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("processors", "parallel", "streams", "workers"),
    [(1, True, 1, 1), (2, True, 2, 1), (3, True, 3, 2), (64, True, 4, 4), (64, False, 1, 4)],
)
def test_connections_and_threads_follow_the_processors_where_nobody_has_said(
    processors: int, parallel: bool, streams: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amig.policy.MOST_CHOSEN", 4)
    settled = Policy(downtime=0.03).settled(processors=processors, parallel=parallel)
    assert settled == Policy(downtime=0.03, streams=streams, workers=workers)
    asked = Policy(streams=7, workers=5)
    assert asked.settled(processors=processors, parallel=parallel) == asked
