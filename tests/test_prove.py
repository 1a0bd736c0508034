"""The model, the search, and what they say about the designs."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amig.dirty.registry import strategies
from amig.sim.proof import search as engine
from amig.sim.proof.copies import CHUNKS, COUNTED, count
from amig.sim.proof.moves import Phase, allowed, apply, moves
from amig.sim.proof.page import Steps, copy_kind, misses_a_write, plain, start, without_migration
from amig.sim.proof.rules import BROKEN, DESIGNS, Broken, Rules
from amig.sim.proof.search import LATE, LOST, MARK, MAYBE, NEEDLESS, WINDOW, search
from amig.sim.proof.trace import draw, legend
from amig.sim.proof.verdicts import SOURCES, Verdict, refute, shortest, verdicts

SAFE = ("auto-clear", "slot-cache", "exact", "ring")
WHOLE = [Rules(design=name, users=2, external=True, initially_set=first) for name in DESIGNS for first in (True, False)]
"""All that the model has, of each design."""

bits = st.integers(0, 255)


# What the search stands on.


@pytest.mark.parametrize("name", sorted(strategies))
@settings(deadline=None)
@given(fresh=bits, cache=bits, mine=bits, exact=st.booleans())
def test_a_design_treats_every_page_apart(name: str, fresh: int, cache: int, mine: int, exact: bool) -> None:
    """So a page may be modelled by itself, with bitmaps of one bit."""
    design = strategies[name]()
    whole = [design.sync(fresh, cache), design.take(mine, cache, 255, exact=exact), design.give_back(mine, cache)]
    for page in range(8):

        def bit(word: int, page: int = page) -> int:
            return word >> page & 1

        single = [
            design.sync(bit(fresh), bit(cache)),
            design.take(bit(mine), bit(cache), 1, exact=exact),
            design.give_back(bit(mine), bit(cache)),
        ]
        assert [tuple(map(bit, result)) for result in whole] == [tuple(result) for result in single]


def by_hand(rules: Rules, pages: int) -> tuple[int, dict[str, int]]:
    """A search without any cleverness: the number of states, and of steps to each event."""
    steps, every = Steps(rules), moves(rules, pages)
    first = [(Phase.RUN, (start(rules),) * pages)]
    if rules.users > 1:
        first.append((Phase.ALONE, (without_migration(start(rules)),) * pages))
    seen = {(phase, tuple(sorted(plain(page, rules) for page in row))) for phase, row in first}
    queue = deque((phase, row, 0) for phase, row in first)
    events: dict[str, int] = {}
    while queue:
        phase, row, depth = queue.popleft()
        if any(map(misses_a_write, row)):
            events.setdefault(MARK, depth)
        for move in every:
            if move.before is not phase or not allowed(move, row, rules):
                continue
            here = [row[i] for i in move.pages]
            if move.step == "take":
                for kind, what in (("needless", NEEDLESS), ("window", WINDOW), ("late", LATE)):
                    if any(copy_kind(page) == kind for page in here):
                        events.setdefault(what, depth + 1)
            if move.step == "take1" and any(page.pending1 and not page.missed1 for page in here):
                events.setdefault(MAYBE, depth + 1)
            if move.after is Phase.DONE:
                if any(page.stale for page in row):
                    events.setdefault(LOST, depth + 1)
                continue
            after = apply(move, row, steps)
            key = (move.after, tuple(sorted(plain(page, rules) for page in after)))
            if key not in seen:
                seen.add(key)
                queue.append((move.after, after, depth + 1))
    return len(seen), events


@pytest.mark.parametrize("design", DESIGNS)
def test_the_search_finds_what_a_plain_one_finds(design: str) -> None:
    small = Rules(design=design, failures=False)
    for rules, pages in ((small, 1 if design == "ring" else 2), (Rules(design=design, users=2, external=True), 1)):
        found = search(rules, pages=pages)
        states, events = by_hand(rules, pages)
        assert found.complete
        assert found.states == states
        opened = {what: trace[0].move.text == "switches the log on" for what, trace in found.traces.items() if trace}
        assert {what: len(trace) - opened.get(what, False) for what, trace in found.traces.items()} == events


@pytest.mark.parametrize("rules", WHOLE, ids=lambda rules: f"{rules.design}-{rules.initially_set}")
def test_what_is_forgotten_to_make_the_search_short_changes_nothing(
    rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = search(rules, pages=1)
    monkeypatch.setattr(engine, "plain", lambda page, _: page)
    long = search(rules, pages=1)
    assert short.states < long.states
    assert {what: len(trace) for what, trace in short.traces.items()} == {
        what: len(trace) for what, trace in long.traces.items()
    }


def test_a_trace_is_a_way_through_the_model() -> None:
    rules = Rules(design="migration-bitmap", users=2, external=True)
    for what, trace in search(rules, pages=2).traces.items():
        here, at = (start(rules),) * 2, Phase.RUN
        for moment in trace:
            if moment.move.text == "switches the log on":
                here, at = moment.pages, Phase.ALONE
                continue
            assert moment.move.before is at, what
            assert allowed(moment.move, here, rules), what
            here, at = apply(moment.move, here, Steps(rules)), moment.move.after
            assert moment.pages == here


def test_a_search_that_was_stopped_does_not_say_never() -> None:
    found = search(Rules(design="blind", users=2, external=True), pages=2, depth=5)
    assert not found.complete
    assert found.depth == 5
    assert LOST not in found.traces
    (row, *_) = verdicts(["blind"], pages=2, users=1, depth=5)
    assert row.word(LOST) == "not found"


# What it says.


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("design", SAFE)
def test_the_safe_designs_lose_no_page_and_no_mark(design: str, first: bool) -> None:
    pages = 1 if design == "ring" else 2
    found = search(Rules(design=design, users=2, external=True, initially_set=first), pages=pages)
    assert found.complete
    assert not {LOST, MARK} & set(found.traces)


def test_the_safe_designs_lose_nothing_with_three_users() -> None:
    for design in SAFE:
        found = search(Rules(design=design, users=3, external=True, failures=design == "exact"), pages=1)
        assert found.complete
        assert not {LOST, MARK} & set(found.traces)


def test_the_ring_loses_nothing_where_its_order_and_size_matter() -> None:
    found = search(Rules(design="ring", failures=False), pages=2)
    assert found.complete
    assert not {LOST, MARK} & set(found.traces)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("users", [1, 2])
def test_exact_sends_nothing_needlessly_and_slot_cache_does(users: int, first: bool) -> None:
    for external, failures in SOURCES:
        rules = Rules(design="exact", users=users, external=external, failures=failures, initially_set=first)
        found = search(rules, pages=1 if external and failures else 2)
        assert found.complete
        assert NEEDLESS not in found.traces
        also = search(replace(rules, design="slot-cache"), pages=1)
        clean = users == 1 and first and not external and not failures
        assert (NEEDLESS not in also.traces) == clean


def test_blind_loses_a_page_of_a_chunk_that_was_written_after_the_get() -> None:
    assert LOST not in search(Rules(design="blind", failures=False), pages=1).traces
    found = search(Rules(design="blind", failures=False, saving=False), pages=2)
    told = [(moment.move.actor, moment.move.told()) for moment in found.traces[LOST]]
    wrote = told.index(("guest", "writes page 0"))
    assert ("migration", "takes and clears pages 0 and 1") in told[wrote:]
    assert found.traces[LOST][-1].pages[0].stale


def test_the_migration_bitmap_loses_a_page_to_a_second_user_only() -> None:
    assert not {LOST, MARK} & set(search(Rules(design="migration-bitmap", external=True), pages=2).traces)
    found = search(Rules(design="migration-bitmap", users=2, failures=False, saving=False), pages=1)
    told = [(moment.move.actor, moment.move.told()) for moment in found.traces[LOST]]
    took = told.index(("migration", "takes and clears page 0"))
    wrote = told.index(("guest", "writes page 0"))
    cleared = told.index(("display", "takes and clears page 0"))
    assert took < wrote < cleared


HARM = {Broken.NO_COMPENSATION: MARK, Broken.TWO_EXACT: NEEDLESS}


@pytest.mark.parametrize("broken", Broken)
def test_every_rule_is_there_for_a_reason(broken: Broken) -> None:
    found = refute(broken)
    assert found.what == HARM.get(broken, LOST)
    kept = search(replace(found.found.rules, broken=None), pages=1)
    assert kept.complete
    assert found.what not in kept.traces, "the same without breaking the rule"


def test_there_is_a_design_for_every_rule() -> None:
    assert set(BROKEN) == set(Broken)
    assert set(BROKEN.values()) <= set(DESIGNS)


# Words and numbers.


def test_traces_are_aligned_and_say_what_they_show() -> None:
    found = search(Rules(design="slot-cache", external=True, failures=False), pages=1)
    lines = draw(found, NEEDLESS)
    assert lines[-1].startswith("=> nothing wrote page 0")
    column = lines[0].index("destination")
    assert {line[column] for line in lines[1:-1]} <= set("=!")
    assert "another source" in legend(found.rules)


def test_the_plainest_way_is_told() -> None:
    row = Verdict(design="migration-bitmap", users=2, external=False, failures=False, happens={LOST: "yes"})
    found = shortest(row, LOST)
    assert found.pages == 1
    assert not found.rules.saving
    with pytest.raises(LookupError):
        shortest(Verdict(design="exact", users=1, external=False, failures=False, happens={LOST: "yes"}), LOST, pages=1)


@pytest.mark.parametrize("disturbed", [False, True])
def test_exact_copies_least(disturbed: bool) -> None:
    chunk = CHUNKS[-1]
    exact, cache, auto = (count(name, chunk, disturbed=disturbed) for name in ("exact", "slot-cache", "auto-clear"))
    assert set(COUNTED) == {"exact", "slot-cache", "auto-clear"}
    assert exact.first == cache.first == auto.first
    assert exact.needless == auto.needless == 0
    assert (cache.needless > 0) == disturbed
    assert exact.window < auto.window / 10

    def again(run: object) -> int:
        return run.needed + run.window + run.needless  # type: ignore[attr-defined, no-any-return]

    assert again(exact) <= again(cache)
    assert again(exact) < again(auto)


def test_fewer_pages_a_chunk_mean_a_shorter_window() -> None:
    copies = [count("exact", chunk, disturbed=False).window for chunk in CHUNKS]
    assert copies == sorted(copies, reverse=True)
    assert copies[-1] < copies[0] / 10


# The command.


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    from amig.cli.app import main

    with pytest.raises(SystemExit) as ended:
        main(["prove", *words])
    assert ended.value.code in (0, None), capsys.readouterr().err
    return capsys.readouterr().out


def test_prove_prints_the_table_and_the_shortest_ways(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "--strategy", "migration-bitmap", "--strategy", "exact", "--pages", "1", "--no-rules")
    rows = [line.split() for line in shown.splitlines()]
    assert ["exact", "2", "guest", "never", "never", "never", "never", "yes"] in [row[:8] for row in rows]
    assert ["migration-bitmap", "2", "guest", "yes", "never", "yes"] in [row[:6] for row in rows]
    assert "migration-bitmap: lost page" in shown
    assert "exact: lost" not in shown
    assert "every reachable state" in shown
    assert "no KVM was asked" in " ".join(shown.split())


def test_prove_breaks_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "--strategy", "ring", "--pages", "1", "--users", "1", "--depth", "4")
    assert "NOT every reachable state" in shown
    for rule in ("read-before-reset", "no-kick", "full-ring-forgets"):
        assert f"rule broken on purpose, {rule} (ring): lost page" in shown


def test_prove_answers_programs(capsys: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(run(capsys, "--strategy", "slot-cache", "--pages", "1", "--users", "1", "--json"))
    assert {row["sources"] for row in answer["verdicts"]} == {
        "guest", "guest, other", "guest, failures", "guest, other, failures",
    }  # fmt: skip
    assert all(row["complete"] and row["states"] > 0 for row in answer["verdicts"])
    assert answer["verdicts"][1]["happens"]["needless copy"] == "yes"
    assert answer["verdicts"][1]["traces"]["needless copy"][-1].startswith("=> nothing wrote")
    assert [rule["broken"] for rule in answer["rules"]] == ["clear-first"]
    assert len(answer["copies"]) == 2 * len(CHUNKS)


def test_prove_knows_its_designs(capsys: pytest.CaptureFixture[str]) -> None:
    from amig.cli.app import main

    with pytest.raises(SystemExit) as ended:
        main(["prove", "--strategy", "magic"])
    assert ended.value.code == 2
    assert "auto-clear, slot-cache, exact" in capsys.readouterr().err
