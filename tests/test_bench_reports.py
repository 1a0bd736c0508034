"""What the benches make of their runs: pure arithmetic and text."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from amig.bench import figure
from amig.bench.counting import READ_AFTER, Classes, Copies, Look
from amig.bench.files import insert, write
from amig.bench.hosts import Serial
from amig.bench.losses import COMPANIES, DESIGNS, Cell, Losses, may_lose, plan
from amig.bench.losses_table import markdown as losses_markdown
from amig.bench.measured import LogCost, Moved, Run
from amig.bench.scenario import GIB, MIB, Scenario, Variant, choose, variants
from amig.bench.summary import Report, Spread, limit_of, row, spread, summarise
from amig.bench.table import markdown, show, table
from amig.errors import NotConverging, UsageError
from amig.events import PageCounts, Result, WindowMs
from amig.memory import PAGE_SIZE

SCENARIO = Scenario.published(0.1)
VARIANT = Variant(name="slot-cache", strategy="slot-cache")


def moved(total_s: float = 2.0, status: str = "completed", **more: object) -> Moved:
    result = Result(
        status=status,
        exit_code=0 if status == "completed" else NotConverging.exit_code,
        total_ms=total_s * 1e3,
        rounds=9,
        pages=PageCounts(total=SCENARIO.memory // PAGE_SIZE, sent=500_000, zero=78_000, resent=200_000),
        window_ms=WindowMs(p50=0.8, p99=2.0, max=9.0),
    )
    figures: dict[str, object] = {
        "idle_rate": 220_000.0,
        "rate": 200_000.0,
        "skipped": 0,
        "log_start_ms": 1.5,
        "rounds": ((300_000, 200_000, 1.0, 1.2e9), (200_000, 2_000, 0.7, 1.0e9)),
        "log": LogCost(gets=10, get_ms=1.0, clears=100, clear_ms=50.0, pages_cleared=500_000),
    }
    return Moved(result=result, **(figures | more))  # type: ignore[arg-type]


def run(number: int, total_s: float = 2.0, status: str = "completed", **more: object) -> Run:
    return Run(variant="slot-cache", number=number, moved=moved(total_s, status, **more), downtime_ms=5.0)


# --- the scenario ----------------------------------------------------------------------------------------------------


def test_a_tenth_of_the_published_scenario() -> None:
    assert SCENARIO.working_set == pytest.approx(GIB, rel=0.01)
    assert SCENARIO.memory == pytest.approx(1.3 * GIB, rel=0.01)
    assert (SCENARIO.rate, SCENARIO.link) == (900_000_000, 1_250_000_000)
    assert SCENARIO.downtime == pytest.approx(0.01)
    assert SCENARIO.memory % (2 * MIB) == SCENARIO.working_set % (2 * MIB) == 0


@pytest.mark.parametrize("scale", [0, -1, math.nan, 11])
def test_a_scale_that_makes_no_sense(scale: float) -> None:
    with pytest.raises(UsageError):
        Scenario.published(scale)


def test_a_machine_that_does_not_hold_the_rates_gets_both_slowed() -> None:
    assert SCENARIO.slowed(0.99) == SCENARIO
    slower = SCENARIO.slowed(0.62)
    assert (slower.rate, slower.link) == (540_000_000, 750_000_000)
    assert slower.rate / slower.link == SCENARIO.rate / SCENARIO.link
    assert SCENARIO.slowed(0.0).rate == 45_000_000


def test_the_rest_of_memory_may_hold_data() -> None:
    assert (
        f"fill_size={64 * MIB}"
        in Scenario(memory=64 * MIB, working_set=MIB, rate=1, link=1, downtime=1, fill_rest=True).words.split()
    )


def test_every_design_is_run_and_the_published_chunks() -> None:
    found = {(v.strategy, v.span, v.initially_set) for v in variants()}
    for span in (GIB, 128 * MIB, 16 * MIB, MIB, 256 << 10):
        assert ("slot-cache", span, True) in found
    for strategy in ("slot-cache", "exact"):
        assert {(strategy, None, True), (strategy, None, False)} <= found
    assert {("auto-clear", None, True), ("ring", None, True)} <= found
    assert all(v.ring for v in variants(every=True) if v.strategy == "ring")
    assert len({v.name for v in variants(every=True)}) == len(variants(every=True))


def test_variants_are_chosen_by_name_or_by_its_beginning() -> None:
    assert [v.name for v in choose(["exact"])] == ["exact"]
    assert [v.name for v in choose(["ring", "exact,"])] == ["ring", "exact, not initially set"]
    assert len(choose(["slot-cache, span"])) == 5
    with pytest.raises(UsageError, match="there are auto-clear; slot-cache, span 1GiB"):
        choose(["D4"])


# --- the summary -----------------------------------------------------------------------------------------------------


def test_the_link_is_the_mean_over_all_that_was_sent() -> None:
    assert moved().link == pytest.approx(500_000 / (300_000 / 1.2e9 + 200_000 / 1.0e9))
    assert moved(rounds=()).link == 0


def test_the_limit_goes_by_the_rates_that_were_achieved() -> None:
    full = moved(rate=0.9e9 / 4096, rounds=((1, 0, 1.0, 1.25e9),))
    # 340787 pages less 78000 that are zero: a little more than the working set.
    assert limit_of(full, SCENARIO) == pytest.approx(1.5, abs=0.05)
    bursts = moved(rate=0.9e9 / 4096, rounds=((1, 0, 1.0, 2e9),))
    assert limit_of(bursts, SCENARIO) == limit_of(full, SCENARIO), "the cap holds"
    slow = moved(rate=0.9e9 / 4096, rounds=((1, 0, 1.0, 0.95 * 1.25e9),))
    assert limit_of(slow, SCENARIO) > 1.1 * limit_of(full, SCENARIO)
    assert limit_of(moved(rate=1e6), SCENARIO) == math.inf


def test_medians_and_spreads() -> None:
    assert spread([3, 1, 2, None, math.inf]) == Spread(median=2, low=1, high=3)
    assert spread([None]) is None


def test_a_row_is_of_completed_runs_and_says_what_became_of_others() -> None:
    late = run(3, 30.0, "failed", rounds=((1, 4711, 1.0, 1e9),))
    found = row(VARIANT, SCENARIO, [run(1, 2.0), run(2, 2.4), late, Run(variant="slot-cache", number=4, error="gone")])
    assert (found.runs, found.completed) == (4, 2)
    assert found.total_s == Spread(median=2.2, low=2.0, high=2.4)
    assert found.state == "did not converge in 30 s: 9 rounds, 4711 pages left; gone"
    assert found.progress == Spread(median=200 / 220, low=200 / 220, high=200 / 220)
    assert found.get_us == Spread(median=100, low=100, high=100)
    assert found.clear_ns_page == Spread(median=100, low=100, high=100)


def test_a_row_in_which_nothing_completed() -> None:
    found = row(VARIANT, SCENARIO, [run(1, 30.0, "failed")])
    assert (found.completed, found.total_s, found.over_limit) == (0, None, None)
    assert found.write_mb_s is not None


def report(*runs: Run) -> Report:
    return summarise(0.1, SCENARIO, SCENARIO.slowed(0.5), [VARIANT, *variants()], runs, ["slow here"])


def test_the_page_has_both_tables() -> None:
    text = markdown(report(run(1, 2.0), run(2, 2.4), run(3, 30.0, "failed")))
    assert "**Note:** slow here." in text
    assert "| 2.20 (2.00–2.40), 2 of 3 runs |" in text
    assert "| 5.8 | none of 0 runs |" in " ".join(text.split())
    assert "- slot-cache: did not converge in 30 s: 9 rounds, 2000 pages left" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (11, 12)


def test_tables_are_aligned_and_escape_their_cells() -> None:
    assert table(("", "n"), [("a|b", "1"), ("c", "22")]) == [
        "|      |   n |",
        "|------|----:|",
        "| a\\|b |   1 |",
        "| c    |  22 |",
    ]
    assert show(None) == ""
    assert show(Spread(median=1.234, low=1.0, high=2.0), 1) == "1.2 (1.0–2.0)"
    assert show(Spread(median=1.0, low=1.0, high=1.0), 1) == "1.0"


def test_reports_survive_their_files(tmp_path: Path) -> None:
    found = report(run(1))
    write(tmp_path / "new", "dirty-log", "page\n", found)
    assert (tmp_path / "new" / "dirty-log.md").read_text() == "page\n"
    assert msgspec.json.decode((tmp_path / "new" / "dirty-log.json").read_bytes(), type=Report) == found
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_tables_go_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- measured: losses -->\nold\n<!-- measured: end -->\nb\n<!-- measured: end -->\n")
    insert(page, "losses", "| new |\n")
    wanted = "a\n<!-- measured: losses -->\n| new |\n<!-- measured: end -->\nb\n<!-- measured: end -->\n"
    assert page.read_text() == wanted
    with pytest.raises(UsageError, match="no place"):
        insert(page, "dirty-log", "x")
    assert page.read_text() == wanted


def test_the_documentation_has_both_places() -> None:
    text = (Path(__file__).parent.parent / "docs" / "dirty-log.md").read_text()
    for name in ("dirty-log", "losses"):
        assert f"<!-- measured: {name} -->\n" in text


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure.draw(report(run(1), run(2, 2.2)), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "<svg" in text
    with pytest.raises(UsageError, match="nothing to plot"):
        figure.draw(report(), tmp_path / "none.svg")


# --- copies ----------------------------------------------------------------------------------------------------------


def look(*counts: int, begun: tuple[int, ...] | None = None) -> Look:
    ended = np.array(counts, np.uint64)
    return Look(np.array(begun, np.uint64) if begun else ended, ended)


def page(number: int = 0) -> np.ndarray:
    return np.array([number])


def again(classes: Classes) -> dict[str, int]:
    found = classes.copies
    return {name: n for name in ("needless", "maybe", "window", "late") if (n := getattr(found, name))}


def test_a_page_that_nobody_wrote_is_a_needless_copy() -> None:
    classes = Classes(2)
    classes.took(page(), look(7), look(7))
    classes.took(page(), look(7), look(7))
    assert classes.copies == Copies(taken=2, again=1, needless=1)


def test_a_page_that_was_written_in_between_is_none() -> None:
    classes = Classes(1)
    classes.took(page(), look(7), look(7))
    classes.took(page(), look(8), look(8))
    assert classes.copies == Copies(taken=2, again=1)


def test_a_write_that_was_under_way_proves_nothing() -> None:
    classes = Classes(1)
    classes.took(page(), look(7, begun=(8,)), look(7, begun=(8,)))
    classes.took(page(), look(7, begun=(8,)), look(7, begun=(8,)))
    assert again(classes) == {"maybe": 1}


def test_a_write_during_either_clear_proves_nothing() -> None:
    for first, second in (((7, 8), (8, 8)), ((7, 7), (7, 8))):
        classes = Classes(1)
        classes.took(page(), look(first[0]), look(first[1]))
        classes.took(page(), look(second[0]), look(second[1]))
        assert again(classes) == {"maybe": 1}


def test_a_write_between_clear_and_read_is_the_windows() -> None:
    classes = Classes(READ_AFTER + 1)
    counts = np.full(READ_AFTER + 1, 7, np.uint64)
    for number in range(READ_AFTER):
        classes.looked(lambda pages: counts[pages])
        classes.took(page(number), look(7), look(7))
    counts[0] = 8  # and then it is read
    classes.looked(lambda pages: counts[pages])
    classes.took(page(READ_AFTER), look(7), look(7))
    classes.took(page(0), look(8), look(8))
    assert again(classes) == {"window": 1}


def test_a_mark_that_comes_late_is_counted_apart() -> None:
    classes = Classes(1)
    external = 2 << 32
    classes.synced(look(7), look(7))
    classes.took(page(), look(external + 7), look(external + 7))
    classes.took(page(), look(external + 7), look(external + 7))
    assert again(classes) == {"late": 1}


def test_an_external_write_that_is_under_way_proves_nothing() -> None:
    classes = Classes(1)
    odd = (1 << 32) + 7
    classes.took(page(), look(odd), look(odd))
    classes.took(page(), look(odd), look(odd))
    assert again(classes) == {"maybe": 1}


def test_where_the_log_is_cleared_when_it_is_read_the_window_begins_there() -> None:
    classes = Classes(1, clear_at_sync=True)
    classes.synced(look(7), look(7))
    classes.took(page(), look(8), look(8))
    classes.synced(look(8), look(8))
    classes.took(page(), look(8), look(8))
    assert again(classes) == {"window": 1}
    classes.took(page(), look(8), look(8))
    assert again(classes) == {"window": 1, "needless": 1}


# --- losses ----------------------------------------------------------------------------------------------------------


def test_what_is_claimed_of_the_designs() -> None:
    claimed = {(d.strategy, company) for d in DESIGNS for company in COMPANIES if may_lose(d, company)}
    assert claimed == {("blind", name) for name in COMPANIES} | {("migration-bitmap", c) for c in ("users", "all")}


def test_cells_are_chosen() -> None:
    assert len(plan([], [])) == len(DESIGNS) * len(COMPANIES)
    assert [(d.name, c) for d, c in plan(["exact"], ["users"])] == [("exact", "users")]
    assert [d.name for d, _ in plan(["slot"], ["alone"])] == ["slot-cache", "slot-cache, not initially set"]
    for wrong in ((["D9"], []), ([], ["friends"])):
        with pytest.raises(UsageError, match="there are"):
            plan(*wrong)


def test_a_design_keeps_its_promise_or_not() -> None:
    safe = Cell(design="exact", company="all", may_lose=False, migrations=2, completed=2)
    lost = Cell(design="blind", company="all", may_lose=True, migrations=2, completed=2, damaged=1, pages_lost=3)
    assert Losses(runs=2, cells=(safe, lost)).as_claimed
    assert not Losses(runs=2, cells=(msgspec.structs.replace(safe, damaged=1),)).as_claimed
    assert not Losses(runs=2, cells=(msgspec.structs.replace(safe, completed=1),)).as_claimed
    assert not Losses(runs=2, cells=(msgspec.structs.replace(lost, damaged=0),)).as_claimed


def test_the_page_of_losses() -> None:
    lost = Cell(
        design="blind",
        company="alone",
        may_lose=True,
        migrations=3,
        completed=2,
        damaged=2,
        pages_lost=9,
        words=("MISMATCH page=1",),
        errors=("it hung",),
        copies=Copies(taken=1000, again=100, needless=10, maybe=5, window=20),
    )
    text = losses_markdown(Losses(runs=3, cells=(lost,)))
    assert "2 of 2 (9 pages), 1 failed" in text
    assert "10 – 15 | 1.00 – 1.50 |" in text
    assert "blind, alone: MISMATCH page=1" in text
    assert "- blind, alone: it hung" in text


def test_a_guests_complaints_are_found_in_its_output() -> None:
    serial = Serial()
    serial(b"amig guest\r\nMISMATCH page=7\r\n" + b"x" * 70_000 + b"\r\nMISMATCH page=8\r\nMISM")
    assert serial.mismatches() == ("MISMATCH page=8",)
