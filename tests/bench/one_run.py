"""One migration, of either side: source, destination, the observer, and whoever moves the guest."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from amig import fluid
from amig.children import Child, Place
from amig.errors import AmigError
from amig.memory import PAGE_SIZE
from tests.bench import iperf, ours, qemu
from tests.bench.lowmem import LowMemory, populated
from tests.bench.measured import Run, TooLong
from tests.bench.qmp import QmpError
from tests.bench.scenarios import Mode, Scenario
from tests.bench.watch import Seen

SETTLE = 1.0
"""Seconds for which the guest is looked at before it is moved."""
BOOT_TIMEOUT = 180.0
_MARGIN = 30.0
_ROOT = Path(__file__).resolve().parent.parent.parent
"""Where `python -m tests.bench.watch` is found."""


class Observer:
    """The process that watches."""

    def __init__(self, child: Child) -> None:
        self._child = child

    @classmethod
    @asynccontextmanager
    async def started(cls, source: int, destination: int, place: Place) -> AsyncIterator[Observer]:
        """Run it for the length of the block."""
        words = ["-m", "tests.bench.watch", str(source), str(destination)]
        async with Child.started("observer", words, place) as child:
            await child.line("watching")
            yield cls(child)

    async def tell(self, *words: object) -> None:
        """Say something and wait until it has been heard."""
        assert self._child.process.stdin is not None
        self._child.process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        await self._child.line("done")

    async def seen(self, timeout: float) -> Seen | None:
        """Return what was seen once the guest has landed; None when it has not."""
        line = await self._child.line("landed", timeout=timeout)
        return msgspec.convert(line, Seen) if line.pop("landed") else None


async def one_run(scenario: Scenario, mode: Mode, turn: int, *, preallocated: bool) -> Run:
    """Run it; whatever goes wrong is in the result. Cancelling ends all processes."""
    known: dict[str, Any] = {
        "scenario": scenario.name,
        "mode": mode.name,
        "side": mode.side,
        "preallocated": preallocated,
        "turn": turn,
    }
    sides = {"amig": _amig, "qemu": _qemu, "iperf3": _iperf}
    with Place.temporary() as place:
        place.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(_ROOT))))
        try:
            async with asyncio.timeout(scenario.limit + BOOT_TIMEOUT + _MARGIN):
                await sides[mode.side](scenario, mode, preallocated, place, known)
        except TimeoutError:
            known["error"] = "it hung, and was ended"
        except (AmigError, QmpError, TooLong, RuntimeError) as error:
            known["error"] = " ".join(str(error).split())
    return Run(**known)


async def _amig(scenario: Scenario, mode: Mode, preallocated: bool, place: Place, known: dict[str, Any]) -> None:
    async with ours.hosts(scenario, place, preallocated=preallocated) as pair:
        source, destination = pair.source.process.pid, pair.destination.process.pid
        await _ready(source, destination, scenario, preallocated=preallocated)
        async with Observer.started(source, destination, place) as observer:
            await _settle(observer)

            async def joined(pid: int) -> None:
                await observer.tell("with", pid)

            began, result = await ours.migrate(scenario, mode, pair, place, joined, timeout=scenario.limit)
            ours.figures(result, known)
            await _landed(observer, began.command, known)
            known |= {"start_s": began.migration - began.command, "start_cpu_s": began.cpu_s}
    _add_limit(scenario, known)


async def _qemu(scenario: Scenario, mode: Mode, preallocated: bool, place: Place, known: dict[str, Any]) -> None:
    async with (
        qemu.Qemu.started(scenario, place.root) as source,
        qemu.Qemu.started(scenario, place.root, preallocated=preallocated, incoming=True) as destination,
    ):
        address = await qemu.prepare(source, destination, scenario, mode)
        await _ready(source.pid, destination.pid, scenario, preallocated=preallocated)
        async with Observer.started(source.pid, destination.pid, place) as observer:
            await _settle(observer)
            at = await qemu.migrate(source, address)
            try:
                async with asyncio.timeout(scenario.limit):
                    info = await qemu.ended(source)
            except TimeoutError:
                raise TooLong(scenario.limit, *await qemu.so_far(source)) from None
            qemu.figures(info, known)
            await _landed(observer, at, known)
            known["start_s"] = 0.0


async def _iperf(scenario: Scenario, mode: Mode, preallocated: bool, place: Place, known: dict[str, Any]) -> None:
    async with ours.hosts(scenario, place, preallocated=False) as pair:
        await _ready(pair.source.process.pid, 0, scenario, preallocated=False)
        known["total_s"] = await iperf.carry(scenario.memory, scenario.streams, scenario.link)


async def _ready(source: int, destination: int, scenario: Scenario, *, preallocated: bool) -> None:
    """Wait until the guest works, and the destination has the memory that it is to have beforehand."""
    end = time.monotonic() + BOOT_TIMEOUT
    while time.monotonic() < end:
        low = LowMemory.of(source)
        there = not preallocated or populated(destination) >= 0.99 * scenario.memory
        if low is not None and low.running() and there:
            return
        await asyncio.sleep(0.05)
    raise RuntimeError(f"the guest's workload did not start, or the destination had no memory, in {BOOT_TIMEOUT:g} s")


async def _settle(observer: Observer) -> None:
    # The guest's clock is compared with ours over that second, too: at its beginning and at its end.
    await asyncio.sleep(0.1)
    await observer.tell("settle")
    await asyncio.sleep(SETTLE)
    await observer.tell("go")


async def _landed(observer: Observer, at: float, known: dict[str, Any]) -> None:
    seen = await observer.seen(timeout=_MARGIN)
    if seen is None:
        raise RuntimeError("the guest has moved, but was not seen to run over there")
    known.update(
        total_s=seen.landed_s - at,
        downtime_ms=seen.downtime_ms,
        uncertain_ms=seen.uncertain_ms,
        stalled_ms=seen.stalled_ms,
        idle_writes_per_s=seen.idle_writes_per_s,
        progress=seen.writes_per_s / seen.idle_writes_per_s if seen.idle_writes_per_s else None,
        cpu_source_s=seen.cpu_source_s,
        cpu_destination_s=seen.cpu_destination_s,
        cpu_vcpu_s=seen.cpu_vcpu_s,
        observer_cpu_s=seen.observer_cpu_s,
        source_bytes=seen.source_bytes,
        destination_bytes=seen.destination_bytes,
    )


def _add_limit(scenario: Scenario, known: dict[str, Any]) -> None:
    """Add the fluid limit for the link and write rate that this run really had."""
    if not scenario.working_set or not known["link_bytes_per_s"]:
        return
    link = min(known["link_bytes_per_s"], scenario.link or float("inf"))
    pages = scenario.working_set // PAGE_SIZE
    flow = fluid.Flow(
        memory=max(scenario.pages - known["pages_zero"], pages),
        working_set=pages,
        dirty_rate=known["idle_writes_per_s"] * (known["progress"] or 0.0),
        link=link / PAGE_SIZE,
        downtime=scenario.downtime,
    )
    limit = fluid.seconds(flow)
    known["limit_s"] = limit if limit != float("inf") else None
