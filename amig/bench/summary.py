"""From runs to a report: medians, spreads, and the fluid limit for the rates that were really achieved. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import msgspec

from amig import fluid
from amig.bench.measured import Moved, Run
from amig.bench.scenario import PUBLISHED_SECONDS, Scenario, Variant
from amig.memory import PAGE_SIZE


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Several runs' figure."""

    median: float
    low: float
    high: float


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One variant. What is None was not measured."""

    variant: str
    published_s: float | None
    """Peter Xu's total time, at full scale."""
    runs: int
    completed: int
    state: str
    """What came of the runs that did not complete."""
    total_s: Spread | None = None
    limit_s: Spread | None = None
    """The fluid limit at each run's own link and write rate."""
    over_limit: Spread | None = None
    """Total by limit."""
    pages: Spread | None = None
    twice: Spread | None = None
    """Pages sent after they had been sent before."""
    rounds: Spread | None = None
    window_p50_ms: Spread | None = None
    window_p99_ms: Spread | None = None
    downtime_ms: Spread | None = None
    """From outside."""
    progress: Spread | None = None
    """Pages that the guest wrote in a second during the migration, by those before it."""
    write_mb_s: Spread | None = None
    link_mb_s: Spread | None = None
    """While really sending; above the cap where what was held back goes in bursts."""
    pace_mb_s: Spread | None = None
    """Content of pages sent, by the total time."""
    log_start_ms: Spread | None = None
    get_us: Spread | None = None
    """A GET."""
    clear_ms: Spread | None = None
    """All CLEARs of a migration."""
    clears: Spread | None = None
    clear_ns_page: Spread | None = None
    """CLEAR for each page that it cleared."""
    ring_full: Spread | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it; what the JSON file holds."""

    scale: float
    asked: dict[str, float]
    used: dict[str, float]
    """The scenario, with the rates that this machine holds."""
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    runs: tuple[Run, ...]


def limit_of(moved: Moved, scenario: Scenario) -> float:
    """Return the fluid limit in seconds for what a run really had: its link, its guest's write rate, its memory."""
    pages = moved.result.pages
    # Whatever was sent for the first time and is not zero: zero pages hardly ever become anything else here.
    memory = max(pages.total - pages.zero, scenario.pages)
    return fluid.seconds(
        fluid.Flow(
            memory=memory,
            working_set=scenario.pages,
            dirty_rate=moved.rate,
            # A sparse round is sent in bursts, each quicker than the cap; no run as a whole can be.
            link=min(moved.link, scenario.link) / PAGE_SIZE,
            downtime=scenario.downtime,
        )
    )


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return the median, and the least and most; None of nothing."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found:
        return None
    return Spread(median=statistics.median(found), low=min(found), high=max(found))


def summarise(
    scale: float,
    asked: Scenario,
    used: Scenario,
    variants: Sequence[Variant],
    runs: Sequence[Run],
    notes: Sequence[str] = (),
) -> Report:
    """Return the report on all runs so far."""
    rows = [row(variant, used, [run for run in runs if run.variant == variant.name]) for variant in variants]
    return Report(
        scale=scale,
        asked=_shown(asked),
        used=_shown(used),
        notes=tuple(notes),
        rows=tuple(rows),
        runs=tuple(runs),
    )


def _shown(scenario: Scenario) -> dict[str, float]:
    return {
        "memory_bytes": scenario.memory,
        "working_set_bytes": scenario.working_set,
        "rate_bytes_per_s": scenario.rate,
        "link_bytes_per_s": scenario.link,
        "downtime_s": scenario.downtime,
        "fill_rest": float(scenario.fill_rest),
    }


def published(variant: Variant) -> float | None:
    """Return the published total time that a variant is to be compared with."""
    if variant.strategy == "auto-clear" and variant.span is None:
        return PUBLISHED_SECONDS["auto-clear"]
    span = variant.name.rpartition("span ")[2]
    return PUBLISHED_SECONDS.get(span) if variant.strategy == "slot-cache" and variant.span else None


def row(variant: Variant, scenario: Scenario, runs: Sequence[Run]) -> Row:
    """Return what the runs of one variant come to; figures are of completed runs only."""
    done = [run for run in runs if run.completed]
    # Where none has completed, what the others cost is better than nothing; their state says what they are.
    moved = [run.moved for run in (done or runs) if run.moved is not None]

    def of(figure: Callable[[Moved], float | None]) -> Spread | None:
        return spread(map(figure, moved))

    def clear_page(one: Moved) -> float | None:
        return one.log.clear_ms * 1e6 / one.log.pages_cleared if one.log and one.log.pages_cleared else None

    return Row(
        variant=variant.name,
        published_s=published(variant),
        runs=len(runs),
        completed=len(done),
        state=_state(runs),
        total_s=of(lambda one: one.result.total_ms / 1e3) if done else None,
        limit_s=of(lambda one: limit_of(one, scenario)),
        over_limit=of(lambda one: one.result.total_ms / 1e3 / limit_of(one, scenario)) if done else None,
        pages=of(lambda one: one.result.pages.sent),
        twice=of(lambda one: one.result.pages.resent),
        rounds=of(lambda one: one.result.rounds),
        window_p50_ms=of(lambda one: one.result.window_ms.p50),
        window_p99_ms=of(lambda one: one.result.window_ms.p99),
        downtime_ms=spread(run.downtime_ms for run in done),
        progress=of(lambda one: one.rate / one.idle_rate if one.idle_rate else None),
        write_mb_s=of(lambda one: one.rate * PAGE_SIZE / 1e6),
        link_mb_s=of(lambda one: one.link / 1e6),
        pace_mb_s=of(lambda one: one.result.pages.sent * PAGE_SIZE / 1e3 / one.result.total_ms),
        log_start_ms=of(lambda one: one.log_start_ms),
        get_us=of(lambda one: one.log.get_ms * 1e3 / one.log.gets if one.log and one.log.gets else None),
        clear_ms=of(lambda one: one.log.clear_ms if one.log else None),
        clears=of(lambda one: one.log.clears if one.log else None),
        clear_ns_page=of(clear_page),
        ring_full=of(lambda one: one.log.ring_full if one.log else None),
    )


def _state(runs: Sequence[Run]) -> str:
    states = []
    for run in runs:
        if run.completed:
            continue
        if run.moved is None:
            states.append(run.error or "failed")
            continue
        result = run.moved.result
        left = run.moved.rounds[-1][1] if run.moved.rounds else 0
        if result.exit_code == NOT_CONVERGING:
            states.append(
                f"did not converge in {result.total_ms / 1e3:.0f} s: {result.rounds} rounds, {left} pages left"
            )
        else:
            states.append(f"{result.status}: {result.error}")
    return "; ".join(states)


NOT_CONVERGING = 44
"""`amig.errors.NotConverging.exit_code`."""
