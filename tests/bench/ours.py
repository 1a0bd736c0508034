"""amig's side: the commands that a user runs, each a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from amig.children import Child, Place
from amig.errors import HostError
from amig.events import Result
from amig.host.images import image_path
from tests.bench import processes
from tests.bench.measured import TooLong
from tests.bench.scenarios import Mode, Scenario

SOURCE, DESTINATION = "source", "destination"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Both hosts."""

    source: Child
    destination: Child
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Began:
    """How a migration began. Times are of CLOCK_MONOTONIC, in seconds."""

    command: float
    migration: float
    cpu_s: float
    """What the process had used until then."""


@asynccontextmanager
async def hosts(scenario: Scenario, place: Place, *, preallocated: bool) -> AsyncIterator[Pair]:
    """Run a guest, and a destination that waits for it, for the length of the block. Raises `HostError`."""
    run = [
        "run", SOURCE, "--kernel", str(image_path()), "--append", scenario.line, "--memory", str(scenario.memory),
        "--json", "--lifeline",
    ]  # fmt: skip
    receive = ["receive", "tcp://127.0.0.1:0", "--name", DESTINATION, "--once", "--json", "--lifeline"]
    if preallocated:
        receive += ["--memory", str(scenario.memory)]
    async with (
        Child.started(SOURCE, ["-m", "amig", *run], place) as source,
        Child.started(DESTINATION, ["-m", "amig", *receive], place) as destination,
    ):
        await source.line("event")
        address = str((await destination.line("listening", timeout=300))["listening"])
        yield Pair(source=source, destination=destination, address=address)


def command(scenario: Scenario, mode: Mode, pair: Pair) -> list[str]:
    """Return the words of ``amig migrate``."""
    words = [
        "migrate", SOURCE, pair.address, "--json", "--downtime", f"{scenario.downtime * 1000:g}ms",
        "--streams", str(mode.streams or scenario.streams), *mode.words,
    ]  # fmt: skip
    if scenario.link is not None:
        words += ["--bandwidth", str(scenario.link)]
    return words


async def migrate(
    scenario: Scenario, mode: Mode, pair: Pair, place: Place, joined: Any, *, timeout: float
) -> tuple[Began, Result]:
    """Run the command; returns when it was given and how its migration began, and its result.

    ``joined`` is awaited with the process's number as soon as there is one. Raises `HostError` for a command that ends
    without a result, and `TooLong`.
    """
    at = time.monotonic()
    async with Child.started("migrator", ["-m", "amig", *command(scenario, mode, pair)], place) as migrator:
        rounds, left = 0, 0
        try:
            await joined(migrator.process.pid)
            line = await migrator.line("event")
            began = Began(
                command=at,
                migration=line["at"] - time.time() + time.monotonic(),
                cpu_s=processes.cpu_s(migrator.process.pid),
            )
            async with asyncio.timeout(timeout):
                while line["event"] != "result":
                    line = await migrator.line("event", timeout=2 * timeout)
                    if line["event"] == "round":
                        rounds, left = line["round"] + 1, line["remaining"]
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                migrator.process.terminate()  # it would go on, for it does not listen to us
            if isinstance(error, TimeoutError):
                raise TooLong(timeout, rounds, left) from None
            raise
        return began, msgspec.convert(line, Result)


def figures(result: Result, run: dict[str, Any]) -> None:
    """Put the result into the fields of a `Run`. Raises `HostError` for a migration that failed."""
    if result.status != "completed":
        raise HostError(f"{result.status}: {result.error}")
    run.update(
        told_s=result.total_ms / 1e3,
        told_downtime_ms=result.downtime_ms,
        pages_sent=result.pages.sent,
        pages_zero=result.pages.zero,
        bytes_wire=result.bytes.wire,
        rounds=result.rounds,
        link_bytes_per_s=result.link_bytes_per_s,
        window_ms=result.window_ms.p50,
    )
