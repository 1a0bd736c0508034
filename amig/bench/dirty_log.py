"""``amig bench dirty-log``: the published table on this machine, runs of all variants by turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from amig.bench.measured import Run
from amig.bench.run_one import run_one
from amig.bench.scenario import Scenario, Variant
from amig.bench.summary import Report, summarise
from amig.children import Place
from amig.memory import PAGE_SIZE
from amig.units import format_rate

Tell = Callable[[str], None]
ENOUGH = 0.95
"""A machine that reaches this share of a rate holds it."""
TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to run."""

    scenario: Scenario
    variants: Sequence[Variant]
    runs: int
    timeout: float
    """Seconds after which a run counts as one that does not converge."""
    scale: float
    calibrate: bool


async def bench(request: Request, tell: Tell, keep: Callable[[Report], None]) -> Report:
    """Run all of it; ``keep`` gets the report so far after each turn, so that an end in the middle loses little.

    Cancelling ends all processes and raises. A variant that did not converge twice is left out of further turns.
    """
    scenario = request.scenario
    notes: list[str] = []
    runs: list[Run] = []
    number = 0
    with Place.temporary() as place:
        if request.calibrate:
            scenario, notes = await _calibrate(request, place, tell)
        report = summarise(request.scale, request.scenario, scenario, request.variants, runs, notes)
        for turn in range(request.runs):
            for variant in request.variants:
                failed = sum(not run.completed for run in runs if run.variant == variant.name)
                if failed >= 2:
                    continue
                number += 1
                run = await run_one(scenario, variant, number, place=place, timeout=request.timeout)
                runs.append(run)
                tell(f"{turn + 1}/{request.runs}  {variant.name:<32} {in_short(run)}")
            report = summarise(request.scale, request.scenario, scenario, request.variants, runs, notes)
            await asyncio.to_thread(keep, report)
    return report


async def _calibrate(request: Request, place: Place, tell: Tell) -> tuple[Scenario, list[str]]:
    """Find rates that this machine holds: try, and slow both down by what was missed, a few times at most."""
    scenario = request.scenario
    notes: list[str] = []
    variant = Variant(name="to see what the machine holds", strategy="slot-cache")
    for attempt in range(TRIES):
        run = await run_one(scenario, variant, -attempt - 1, place=place, timeout=min(request.timeout, 15.0))
        tell(f"---  {variant.name:<32} {in_short(run)}")
        if run.moved is None:
            break
        wrote = run.moved.rate * PAGE_SIZE / scenario.rate
        # Pages carry a little more than themselves over the link, and what is measured is the link.
        carried = run.moved.link / scenario.link
        share = min(wrote, carried)
        if share >= ENOUGH:
            return scenario, notes
        slower = scenario.slowed(share)
        text = (
            f"this machine does not hold the rates: the guest wrote {format_rate(run.moved.rate * PAGE_SIZE)} of "
            f"{format_rate(scenario.rate)} under the log, the link carried {format_rate(run.moved.link)} of "
            f"{format_rate(scenario.link)}: both are scaled, to {format_rate(slower.rate)} and "
            f"{format_rate(slower.link)}"
        )
        tell(text)
        notes.append(text)
        if slower == scenario:
            break
        scenario = slower
    return scenario, notes


def in_short(run: Run) -> str:
    """Return one run in one line."""
    if run.moved is None:
        return f"failed: {run.error}"
    moved, result = run.moved, run.moved.result
    if not run.completed:
        left = moved.rounds[-1][1] if moved.rounds else 0
        return f"{result.status} after {result.total_ms / 1e3:.1f} s, {result.rounds} rounds, {left} pages left"
    outside = "not seen" if run.downtime_ms is None else f"{run.downtime_ms:.1f} ms"
    return (
        f"{result.total_ms / 1e3:6.2f} s  {result.pages.sent:>8} pages  downtime {outside}  window "
        f"{result.window_ms.p50:.2f} ms  wrote {format_rate(moved.rate * PAGE_SIZE)}  link {format_rate(moved.link)}"
    )
