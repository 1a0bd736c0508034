"""From runs to a report: medians, spreads, ratios pair by pair, and what became of the targets. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np

from amig.bench.summary import Spread, spread
from tests.bench.measured import Run
from tests.bench.scenarios import BEST, FLUID, Mode, Scenario, Target

MIB = 1 << 20
EXTRA_BYTES, EXTRA_SHARE = 64 * MIB, 0.003
"""T8: what amig may have beside the guest, and beside its delta cache."""
LINEAR = 0.1
"""T9: how far a guest's cost may be from the line through all."""

Figure = Callable[[Run], float | None]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One mode, with one kind of destination. What is None was not measured."""

    mode: str
    side: str
    preallocated: bool
    runs: int
    whole: int
    trouble: tuple[str, ...] = ()
    total_s: Spread | None = None
    start_s: Spread | None = None
    ratio: Spread | None = None
    """Total time of the scenario's first mode by this one's, pair by pair."""
    downtime_ms: Spread | None = None
    told_downtime_ms: Spread | None = None
    progress: Spread | None = None
    pages_sent: Spread | None = None
    wire_mib: Spread | None = None
    rounds: Spread | None = None
    pace_mb_s: Spread | None = None
    """Bytes on the wire by the time it moved."""
    window_ms: Spread | None = None
    cpu_source_s: Spread | None = None
    cpu_destination_s: Spread | None = None
    cpu_gib_s: Spread | None = None
    """Of both sides, for each GiB of guest memory."""
    source_mib: Spread | None = None
    destination_mib: Spread | None = None
    limit_s: Spread | None = None
    throttle: Spread | None = None


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One target, and what became of it."""

    text: str
    preallocated: bool
    wanted: float
    found: Spread | None
    loaded: Spread | None = None
    """The same without the time in which amig's program starts, where that makes a difference."""

    @property
    def met(self) -> bool | None:
        """None: can't be told."""
        return None if self.found is None else self.found.median <= self.wanted


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario; what the JSON file holds."""

    scenario: str
    title: str
    setting: dict[str, str]
    machine: dict[str, str]
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    runs: tuple[Run, ...]


def ratios(ours: Sequence[Run], theirs: Sequence[Run], figure: Figure) -> Spread | None:
    """Return our figure by theirs, for each turn in which both ended well."""
    by_turn = {run.turn: figure(run) for run in theirs if run.whole}
    pairs = ((figure(run), by_turn.get(run.turn)) for run in ours if run.whole)
    return spread(a / b for a, b in pairs if a is not None and b)


def best(runs: Sequence[Run], figure: Figure = lambda run: run.total_s) -> str | None:
    """Return the QEMU mode with the least median."""
    medians: dict[str, float] = {}
    for mode in {run.mode for run in runs if run.side == "qemu"}:
        some = [value for run in runs if run.mode == mode and run.whole and (value := figure(run)) is not None]
        if some:
            medians[mode] = statistics.median(some)
    return min(medians, key=medians.__getitem__, default=None)


def report(scenario: Scenario, modes: Sequence[Mode], runs: Sequence[Run], machine: dict[str, str]) -> Report:
    """Return the report on all runs so far."""
    rows: list[Row] = []
    findings: list[Finding] = []
    for preallocated in sorted({run.preallocated for run in runs}):
        some = [run for run in runs if run.preallocated == preallocated]
        rows += [row(scenario, modes[0].name, mode, some) for mode in modes]
        findings += find(scenario, modes, some)
    return Report(
        scenario=scenario.name,
        title=scenario.title,
        setting={
            "memory": f"{scenario.memory >> 20} MiB",
            "guest": scenario.line,
            "link": f"{scenario.link / 1e6:g} MB/s" if scenario.link else "no cap",
            "downtime limit": f"{scenario.downtime * 1e3:g} ms",
            "streams": str(scenario.streams),
            "time limit": f"{scenario.limit:g} s",
        },
        machine=machine,
        rows=tuple(rows),
        findings=tuple(findings),
        runs=tuple(runs),
    )


def row(scenario: Scenario, first: str, mode: Mode, runs: Sequence[Run]) -> Row:
    """Return what the runs of one mode come to; figures are of runs that ended well."""
    mine = [run for run in runs if run.mode == mode.name]
    whole = [run for run in mine if run.whole]
    gib = scenario.memory / (1 << 30)

    def of(figure: Figure) -> Spread | None:
        return spread(map(figure, whole))

    def mib(value: float | None) -> float | None:
        return None if value is None else value / MIB

    def pace(run: Run) -> float | None:
        return run.bytes_wire / run.moving_s / 1e6 if run.bytes_wire and run.moving_s else None

    same = mode.name == first
    return Row(
        mode=mode.name,
        side=mode.side,
        preallocated=mine[0].preallocated if mine else runs[0].preallocated,
        runs=len(mine),
        whole=len(whole),
        trouble=tuple(sorted({run.error for run in mine if run.error})),
        total_s=of(lambda run: run.total_s),
        start_s=of(lambda run: run.start_s),
        ratio=None if same else ratios([run for run in runs if run.mode == first], mine, lambda run: run.total_s),
        downtime_ms=of(lambda run: run.downtime_ms),
        told_downtime_ms=of(lambda run: run.told_downtime_ms),
        progress=of(lambda run: run.progress) if scenario.working_set else None,
        pages_sent=of(lambda run: run.pages_sent),
        wire_mib=of(lambda run: mib(run.bytes_wire)),
        rounds=of(lambda run: run.rounds),
        pace_mb_s=of(pace),
        window_ms=of(lambda run: run.window_ms),
        cpu_source_s=of(lambda run: run.cpu_source_s),
        cpu_destination_s=of(lambda run: run.cpu_destination_s),
        cpu_gib_s=of(lambda run: None if run.cpu_s is None else run.cpu_s / gib),
        source_mib=of(lambda run: mib(run.source_bytes)),
        destination_mib=of(lambda run: mib(run.destination_bytes)),
        limit_s=of(lambda run: run.limit_s),
        throttle=of(lambda run: run.throttle or None),
    )


FIGURES: dict[str, tuple[str, Figure]] = {
    "total_s": ("total time", lambda run: run.total_s),
    "cpu_s": ("processor seconds", lambda run: run.cpu_s),
    "downtime_ms": ("downtime", lambda run: run.downtime_ms),
    "slowness": ("time that the guest needs for its work", lambda run: 1 / run.progress if run.progress else None),
}


STARTED: dict[str, Figure] = {"total_s": lambda run: run.moving_s, "cpu_s": lambda run: run.moving_cpu_s}
"""The figures that the start of a program is part of, without it."""


def find(scenario: Scenario, modes: Sequence[Mode], runs: Sequence[Run]) -> Iterable[Finding]:
    """Yield the scenario's own targets, then those of T7 and T8 that hold for every scenario."""
    names = {mode.name for mode in modes}
    for target in scenario.targets:
        if target.ours.name in names and target.theirs in names | {BEST, FLUID}:
            yield _held(scenario, target, runs)
    for ours in modes[:1]:
        if ours.side != "amig":
            return
        if best(runs) is not None:
            for figure in ("downtime_ms", "cpu_s", *(("slowness",) if scenario.working_set else ())):
                yield _held(scenario, Target(ours=ours, theirs=BEST, at_most=1.0, figure=figure), runs, general="T7: ")
        mine = [run for run in runs if run.mode == ours.name and run.whole]
        yield Finding(
            text=f"T7: downtime of {ours.name}, by the limit",
            preallocated=runs[0].preallocated,
            wanted=1.0,
            found=spread(run.downtime_ms / scenario.downtime / 1e3 for run in mine if run.downtime_ms is not None),
        )
        room = EXTRA_BYTES + EXTRA_SHARE * scenario.memory + ours.cache
        yield Finding(
            text=f"T8: memory of {ours.name} beside the guest's, by {room / MIB:.0f} MiB",
            preallocated=runs[0].preallocated,
            wanted=1.0,
            found=spread(run.extra_bytes / room for run in mine if run.extra_bytes is not None),
        )


def _held(scenario: Scenario, target: Target, runs: Sequence[Run], general: str = "") -> Finding:
    what, figure = FIGURES[target.figure]
    ours = [run for run in runs if run.mode == target.ours.name]
    theirs = target.theirs
    if theirs == FLUID:
        found = spread(run.total_s / run.limit_s for run in ours if run.whole and run.total_s and run.limit_s)
        loaded = spread(run.moving_s / run.limit_s for run in ours if run.whole and run.moving_s and run.limit_s)
    else:
        if theirs == BEST:
            name = best(runs)
            theirs = BEST if name is None else name if general else f"{BEST} ({name})"
        else:
            name = theirs
        others = [run for run in runs if run.mode == name]
        found = ratios(ours, others, figure)
        without = STARTED.get(target.figure)
        loaded = None if without is None else ratios(ours, others, without)
    return Finding(
        text=f"{general or scenario.name + ': '}{what} of {target.ours.name}, by {theirs}",
        preallocated=runs[0].preallocated,
        wanted=target.at_most,
        found=found,
        loaded=loaded,
    )


def line_fit(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float, float]:
    """Return the line ``a + b size`` of least squares, and the largest distance of a cost from it, by the line.

    Squares of distances by the cost: what the machine does to a run lengthens it by a share. Distances as they are
    would let the noise of the largest guest bend the line away from the smallest.
    """
    if len(sizes) < 3:
        raise ValueError("a line through fewer than three points says nothing")
    size, cost = np.array(sizes, float), np.array(costs, float)
    (a, b), *_ = np.linalg.lstsq(np.column_stack([np.ones_like(size), size]) / cost[:, None], np.ones_like(cost), None)
    line = a + b * size
    off = float((abs(cost - line) / line).max())
    return float(a), float(b), off
