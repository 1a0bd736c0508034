"""amig beside QEMU on the same guest: ``python -m tests.bench.versus_qemu --scenario T1``.

Runs alternate: in every turn each mode moves one guest, so what the machine does to one it does to the others, and
ratios are taken within a turn. Losing rows stay in. ``tests/bench/versus-qemu`` does the same and makes its
environment first.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import amig
from amig.bench.files import insert, write
from amig.errors import AmigError
from amig.kvm.system import Kvm
from tests.bench import growth, qemu
from tests.bench.measured import Run
from tests.bench.one_run import one_run
from tests.bench.report import draw, markdown
from tests.bench.scenarios import SCENARIOS, Mode, Scenario, choose
from tests.bench.summary import Report, report

GIVEN_UP = 2
"""A mode that did not end well so often in a row is left out of further turns."""
_SPARE = 1 << 30


class NoRoom(Exception):
    """There is not enough memory for a scenario."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return what was asked for; exits with a usage message."""
    names = ", ".join(s.name for s in SCENARIOS)
    parser = argparse.ArgumentParser(prog="versus-qemu", description="amig beside QEMU, on the same guest.")
    parser.add_argument("--scenario", action="append", metavar="NAME", help=f"all, T1 (and so on), or one of {names}")
    parser.add_argument("--pairs", type=int, default=5, help="turns; in each every mode runs once (default: 5)")
    parser.add_argument("--mode", action="append", metavar="NAME", default=[], help="only modes that begin so")
    parser.add_argument(
        "--also", action="append", metavar="NAME=WORDS", default=[], help="a further amig mode: words of amig migrate"
    )
    parser.add_argument(
        "--destination", choices=("both", "populated", "fresh"), default="both", help="memory populated beforehand?"
    )
    parser.add_argument("--streams", type=int, help="instead of the scenario's, for both sides")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="instead of the scenario's, for each run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the reports there: Markdown, JSON, plots")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the tables into this page, between its marks")
    parser.add_argument("--list", action="store_true", help="only show the scenarios and their modes")
    asked = parser.parse_args(words)
    if asked.pairs < 1:
        parser.error("--pairs below 1")
    try:
        asked.scenarios = choose(asked.scenario or ["all"])
    except ValueError as error:
        parser.error(str(error))
    if any("=" not in text for text in asked.also):
        parser.error("--also takes NAME=WORDS")
    return asked


def modes_of(scenario: Scenario, asked: argparse.Namespace) -> list[Mode]:
    """Return who moves the guest."""
    more = [Mode(name=name, side="amig", words=tuple(words.split())) for name, _, words in _parted(asked.also)]
    some = [*scenario.modes[:1], *more, *scenario.modes[1:]]
    return [mode for mode in some if not asked.mode or mode.name.startswith(tuple(asked.mode))]


def _parted(texts: Sequence[str]) -> list[tuple[str, str, str]]:
    return [text.partition("=") for text in texts]


def machine(words: Sequence[str]) -> dict[str, str]:
    """Return where and when this runs, for the page."""
    cpu = platform.machine()
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/cpuinfo").read_text()
        cpu = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    modules = ", ".join(sorted(p.name for p in Path("/sys/module").glob("kvm_*"))) or "built in"
    version = _output(qemu.PROGRAM, "--version").splitlines()
    commit = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    return {
        "machine": f"{cpu}, {os.cpu_count()} processors, Linux {platform.release()}, KVM {modules}",
        "amig": commit.strip() or "no checkout",
        "QEMU": version[0].split("version ", 1)[-1] if version else "none",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load at the start": f"{os.getloadavg()[0]:.2f}",
        "command": f"`tests/bench/versus-qemu {' '.join(words)}`",
    }


def _output(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout
    except OSError:
        return ""


async def compare(scenario: Scenario, asked: argparse.Namespace, where: dict[str, str]) -> Report:
    """Run one scenario; what has been run is kept after each turn."""
    modes = modes_of(scenario, asked)
    kinds = [p for p in scenario.preallocated if {"populated": p, "fresh": not p, "both": True}[asked.destination]]
    runs: list[Run] = []
    found = report(scenario, modes, runs, where)
    for preallocated in kinds:
        failed = dict.fromkeys((mode.name for mode in modes), 0)
        for turn in range(asked.pairs):
            for mode in modes:
                if failed[mode.name] >= GIVEN_UP:
                    continue
                if why := room(scenario):  # others may have taken it meanwhile
                    raise NoRoom(why)
                run = await one_run(scenario, mode, turn, preallocated=preallocated)
                failed[mode.name] = 0 if run.whole else failed[mode.name] + 1
                runs.append(run)
                tell(f"{scenario.name} {turn + 1}/{asked.pairs} {'populated' if preallocated else 'fresh':<9} "
                     f"{mode.name:<28} {in_short(run)}")  # fmt: skip
            found = report(scenario, modes, runs, where)
            if asked.out is not None:
                keep(found, asked.out)
    return found


def in_short(run: Run) -> str:
    """Return one run in one line."""
    if not run.whole:
        return f"failed: {run.error}"
    parts = [f"{run.total_s:6.2f} s"]
    if run.start_s:
        parts.append(f"({run.start_s:.2f} to start)")
    if run.downtime_ms is not None:
        parts.append(f"downtime {run.downtime_ms:.1f} ms +-{run.uncertain_ms or 0:.1f}")
    if run.pages_sent is not None:
        parts.append(f"{run.pages_sent} pages, {run.rounds} rounds")
    if run.cpu_s is not None:
        parts.append(f"CPU {run.cpu_source_s:.2f} + {run.cpu_destination_s:.2f} s")
    if run.progress is not None:
        parts.append(f"guest {run.progress:.2f}")
    return "  ".join(parts)


def keep(found: Report, out: Path) -> None:
    """Write what there is so far."""
    name = f"versus-qemu-{found.scenario}"
    write(out, name, markdown(found), found)
    with contextlib.suppress(ImportError):
        if any(row.total_s is not None for row in found.rows):
            draw(found, out / f"{name}.svg")


def room(scenario: Scenario) -> str | None:
    """Return why there is not enough memory here for source and destination, or None."""
    text = Path("/proc/meminfo").read_text()
    free = int(next(line.split()[1] for line in text.splitlines() if line.startswith("MemAvailable"))) << 10
    need = 2 * scenario.memory + _SPARE
    return None if free >= need else f"it needs {need >> 20} MiB of free memory, and here are {free >> 20}"


def tell(text: str) -> None:
    """Say how it goes."""
    print(text, file=sys.stderr, flush=True)


async def run_all(asked: argparse.Namespace, where: dict[str, str]) -> int:
    """Run all that was asked for. Cancelling ends all processes."""
    reports: list[Report] = []
    for scenario in asked.scenarios:
        try:
            found = await compare(scenario_of(scenario, asked), asked, where)
        except NoRoom as why:
            tell(f"{scenario.name}: skipped: {why}")
            continue
        reports.append(found)
        print(markdown(found), flush=True)
        if asked.page is not None:
            insert(asked.page, scenario.name, markdown(found))
    grown = [r for r in reports if r.scenario.startswith("T9-") and r.rows]
    if grown:
        told = growth.Growth(machine=where, lines=tuple(growth.lines(grown)), rounds=tuple(growth.rounds()))
        print(growth.markdown(told), flush=True)
        if asked.out is not None:
            write(asked.out, "versus-qemu-T9", growth.markdown(told), told)
        if asked.page is not None:
            insert(asked.page, "T9", growth.markdown(told))
    return 0 if reports and all(any(row.whole for row in r.rows) for r in reports) else 1


def scenario_of(scenario: Scenario, asked: argparse.Namespace) -> Scenario:
    """Return it as asked for."""
    from dataclasses import replace

    if asked.streams is not None:
        scenario = replace(scenario, streams=asked.streams)
    return scenario if asked.limit is None else replace(scenario, limit=asked.limit)


def main(words: Sequence[str] | None = None) -> int:
    """Run the bench; returns its exit code."""
    words = sys.argv[1:] if words is None else words
    asked = parse(words)
    if asked.list:
        for scenario in asked.scenarios:
            print(f"{scenario.name:<14} {scenario.title}: {', '.join(m.name for m in modes_of(scenario, asked))}")
        return 0
    if shutil.which(qemu.PROGRAM) is None:
        tell(qemu.HOW_TO_GET_IT)
        return 2
    try:
        Kvm.open().close()
    except AmigError as error:
        tell(str(error))
        return 2

    # As pip leaves an installed package; else each start of amig compiles a checkout anew where that is not kept.
    compileall.compile_dir(str(Path(amig.__file__).parent), quiet=2)

    async def body() -> int:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await run_all(asked, machine(words))

    try:
        return asyncio.run(body())
    except asyncio.CancelledError:
        tell("ended")
        return 130


if __name__ == "__main__":
    sys.exit(main())
