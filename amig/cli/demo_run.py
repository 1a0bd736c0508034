"""The demo, step by step."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import msgspec
import numpy as np

from amig.children import Child, Place
from amig.cli import say
from amig.cli.demo_report import Downtime, Progress, Report, text
from amig.cli.demo_watch import Observed
from amig.cli.loop import on_signals
from amig.cli.progress import display
from amig.cli.verdict import Verdict, until, verdict_of
from amig.control.client import SocketGuest
from amig.control.operator import ControlClient
from amig.errors import HostError, VerifyFailed
from amig.events import Result
from amig.host import guest_abi as abi
from amig.host.attach import open_control
from amig.host.memory import MappedMemory
from amig.memory import PAGE_SIZE, Words
from amig.policy import Policy
from amig.session.migration import Migration
from amig.units import format_rate, format_size

SETTLE = 1.0
"""Seconds for which the guest's speed is measured before and after."""
_BOOT_TIMEOUT = 300.0
_VERIFY_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to show."""

    memory: int
    working_set: int
    rate: int
    vcpus: int
    policy: Policy
    simulated: bool
    lose_a_page: bool
    json: bool

    @property
    def engine(self) -> str:
        """For `amig run`."""
        return "simulator" if self.simulated else "kvm"


async def run_demo(request: Request) -> int:
    """Run the demo; returns its exit code. SIGINT, SIGTERM and SIGHUP end it, and everything that it has started."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - we run in one
    ended_by: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        ended_by.append(number)
        if len(ended_by) == 1:
            task.cancel()
        say.note("amig: ending the demo")

    try:
        with on_signals(stop):
            report = await _show(request)
    except asyncio.CancelledError:
        if not ended_by:
            raise
        return 128 + ended_by[0]
    if request.json:
        say.json_line(report)
    else:
        say.result(text(report))
    if report.status == "intact":
        return 0
    if report.status == "damaged":
        say.note("amig: THE GUEST'S MEMORY IS DAMAGED" + (", as asked for" if request.lose_a_page else ""))
        return VerifyFailed.exit_code
    say.note(f"amig: {report.migration.error or 'the migration was cancelled'}")
    return report.migration.exit_code or 1


async def _show(request: Request) -> Report:
    with Place.temporary("amig-demo-") as place:
        tell = (lambda _: None) if request.json else say.note
        run = [
            "run", "source", "--workload", "check", "--engine", request.engine, "--memory", str(request.memory),
            "--vcpus", str(request.vcpus), "--working-set", str(request.working_set), "--rate", str(request.rate),
            "--append", "tick_us=200 report=0",
        ]  # fmt: skip
        receive = ["receive", "tcp://127.0.0.1:0", "--name", "destination", "--once"]
        common = ["--json", "--lifeline", "--serial", f"file:{place.root}/serial"]
        watch = ["-m", "amig.cli.demo_watch", place.socket("source"), place.socket("destination")]
        async with (
            Child.started("source", ["-m", "amig", *run, *common], place) as source,
            Child.started("destination", ["-m", "amig", *receive, *common], place) as destination,
        ):
            await source.line("event")
            address = str((await destination.line("listening"))["listening"])
            async with Child.started("observer", watch, place) as observer:
                await observer.line("watching")
                _introduce(request, source, destination, address, tell)
                steps = _Steps(request, place, address, tell)
                return await steps.run(source, observer)


def _introduce(request: Request, source: Child, destination: Child, address: str, tell: Callable[[str], None]) -> None:
    guest = "a SIMULATED guest" if request.simulated else "a KVM guest"
    rate = f"{format_rate(request.rate)} of random page writes" if request.rate else "random page writes, unpaced"
    tell(
        f"{guest}: {format_size(request.memory)}, {request.vcpus} vCPU{'s' * (request.vcpus > 1)}, {rate} over "
        f"{format_size(request.working_set)}, each page checked before it is written again"
    )
    tell(f"from process {source.process.pid} to process {destination.process.pid}, over {address}")


class _Steps:
    """What happens between the first and the last look at the guest."""

    def __init__(self, request: Request, place: Place, address: str, tell: Callable[[str], None]) -> None:
        self._request = request
        self._place = place
        self._address = address
        self._tell = tell

    async def run(self, source: Child, observer: Child) -> Report:
        """Do it all; returns the report, also of a migration that failed."""
        async with await open_control(self._place.socket("source"), client="amig demo") as control:
            await until(control, lambda guest: guest.state == "running", _BOOT_TIMEOUT)
            before = await _speed(control)
            number = await control.ask_guest("gap-reset")
            began = await until(control, lambda guest: guest.gap_ack >= number, _BOOT_TIMEOUT)
        began_at = time.monotonic()
        result = await self._migrate()
        took = time.monotonic() - began_at
        if result.status != "completed":
            return self._report(result.status, result)
        self._tell("it runs over there; it goes on for a second, then verifies all its memory")
        async with await open_control(self._place.socket("destination"), client="amig demo") as control:
            arrived = await until(control, lambda guest: True, _BOOT_TIMEOUT)
            during = (arrived.writes - began.writes) * PAGE_SIZE / took
            after = await _speed(control)
            gap = (await until(control, lambda guest: True, _BOOT_TIMEOUT)).gap_max_ns / 1e6
            observed = await _observed(observer)
            verdict = await verdict_of(control, _VERIFY_TIMEOUT, pages=self._request.working_set // PAGE_SIZE)
            await control.stop()
        if code := await source.ended():
            raise HostError(f"the source's host ended with code {code} though its guest has moved")
        downtime = Downtime(
            observed=observed.downtime_ms,
            uncertain=observed.uncertain_ms,
            sample_us=observed.sample_us,
            before=observed.before_ms,
            guest_clock=gap,
            migrator=result.downtime_ms,
            limit=self._request.policy.downtime * 1e3,
        )
        progress = Progress(before=before, during=during, after=after, asked=self._request.rate)
        status = "intact" if verdict.intact else "damaged"
        return self._report(status, result, downtime_ms=downtime, progress_bytes_per_s=progress, verdict=verdict)

    def _report(self, status: str, result: Result, **found: Downtime | Progress | Verdict) -> Report:
        return Report(
            status=status,
            engine=self._request.engine,
            simulated=self._request.simulated,
            memory_bytes=self._request.memory,
            working_set_bytes=self._request.working_set,
            vcpus=self._request.vcpus,
            total_ms=result.total_ms,
            migration=result,
            **found,  # type: ignore[arg-type]
        )

    async def _migrate(self) -> Result:
        kind = _LossyGuest if self._request.lose_a_page else SocketGuest
        guest = await kind.connect(self._place.socket("source"), map_memory=MappedMemory.from_fds, client="amig demo")
        title = "simulated migration" if self._request.simulated else "live migration"
        migration = Migration(guest, self._address, self._request.policy)
        with display(title, quiet=self._request.json) as shown:
            await migration.__aenter__()
            try:
                async for event in migration:
                    shown.show(event)
            finally:
                migration.cancel()  # nothing to cancel unless we are on our way out
                result = await _to_its_end(migration.result())
        return result


async def _to_its_end(result: object) -> Result:
    """Wait for the result even when we are being cancelled: until then the migrator holds the guest."""
    task = asyncio.ensure_future(cast("asyncio.Future[Result]", result))
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            continue
    return task.result()


async def _speed(control: ControlClient) -> float:
    """Let the guest run for a while; returns bytes of pages that it writes in a second."""
    counters = []
    for _ in range(2):
        guest = await until(control, lambda guest: True, _BOOT_TIMEOUT)
        counters.append((time.monotonic(), guest.writes))
        if len(counters) == 1:
            await asyncio.sleep(SETTLE)
    (then, before), (now, after) = counters
    return (after - before) * PAGE_SIZE / (now - then)


async def _observed(observer: Child) -> Observed:
    assert observer.process.stdin is not None  # noqa: S101 - a pipe
    observer.process.stdin.close()
    return msgspec.convert(await observer.line("sample_us"), Observed)


class _LossyGuest(SocketGuest):
    """Never hands over one page of the working set: what a lost dirty bit would do."""

    async def take_and_clear(self, region: int, first: int, count: int) -> Words:
        """Take as told, and forget that page."""
        taken = await super().take_and_clear(region, first, count)
        lost_region, page = self._lost()
        if region != lost_region or not first <= page < first + count:
            return taken
        words = taken.copy()
        words[(page - first) // 64] &= ~np.uint64(1 << (page - first) % 64)
        return words

    def _lost(self) -> tuple[int, int]:
        slot = next(s for s in self.info.memory.slots if s.guest_phys == 0)
        memory = self.memory.pages(slot.region).reshape(-1)[slot.offset : slot.offset + slot.size]
        gpa = abi.ws_gpa(abi.parse_status(memory), 1)
        return slot.region, (slot.offset + gpa) // PAGE_SIZE
