"""One migration of the published scenario: source, destination, migrator and observer, each in a process of its own."""

from __future__ import annotations

import asyncio

import msgspec

from amig.bench.measured import Moved, Run
from amig.bench.mover import BOOT_TIMEOUT, Plan
from amig.bench.scenario import Scenario, Variant
from amig.children import Child, Place
from amig.cli.demo_watch import Observed
from amig.errors import AmigError

_MARGIN = 60.0
"""Seconds that a run may take beyond the migration's own limit and the guest's start."""


async def run_one(scenario: Scenario, variant: Variant, number: int, *, place: Place, timeout: float) -> Run:
    """Run it; whatever goes wrong is in the result. Cancelling ends all processes."""
    try:
        async with asyncio.timeout(timeout + BOOT_TIMEOUT + _MARGIN):
            return await _run(scenario, variant, number, place, timeout)
    except TimeoutError:
        return Run(variant=variant.name, number=number, error="it hung, and was ended")
    except AmigError as error:
        return Run(variant=variant.name, number=number, error=str(error))


async def _run(scenario: Scenario, variant: Variant, number: int, place: Place, timeout: float) -> Run:
    source, destination = f"source{number}", f"destination{number}"
    run = [
        "-m", "amig", "run", source, "--workload", "random", "--memory", str(scenario.memory),
        "--working-set", str(scenario.working_set), "--rate", str(scenario.rate), "--append", scenario.words,
        "--json", "--lifeline",
    ]  # fmt: skip
    if not variant.initially_set:
        run.append("--no-initially-set")
    if variant.ring:
        run += ["--dirty-ring", str(variant.ring)]
    receive = ["-m", "amig", "receive", "tcp://127.0.0.1:0", "--name", destination, "--once", "--json", "--lifeline"]
    watch = ["-m", "amig.bench.observer", place.socket(source), place.socket(destination)]
    async with (
        Child.started(source, run, place) as from_,
        Child.started(destination, receive, place) as to,
    ):
        await from_.line("event")
        address = str((await to.line("listening"))["listening"])
        plan = Plan(
            socket=place.socket(source),
            destination=address,
            strategy=variant.strategy,
            bandwidth=scenario.link,
            downtime=scenario.downtime,
            timeout=timeout,
            chunk=variant.chunk,
            chunk_span=variant.span,
        )
        async with Child.started(f"observer{number}", watch, place) as observer:
            await observer.line("watching")
            mover = ["-m", "amig.bench.mover", msgspec.json.encode(plan).decode()]
            async with Child.started(f"migrator{number}", mover, place) as migrator:
                line = await migrator.line("event", timeout=timeout + BOOT_TIMEOUT + _MARGIN)
            if line["event"] != "moved":
                return Run(variant=variant.name, number=number, error=str(line.get("error")))
            moved = msgspec.convert(line, Moved)
            observed = await _observed(observer) if moved.result.status == "completed" else Observed()
    return Run(
        variant=variant.name,
        number=number,
        moved=moved,
        downtime_ms=observed.downtime_ms,
        uncertain_ms=observed.uncertain_ms,
    )


async def _observed(observer: Child) -> Observed:
    assert observer.process.stdin is not None  # noqa: S101 - a pipe
    observer.process.stdin.close()
    return msgspec.convert(await observer.line("sample_us"), Observed)
