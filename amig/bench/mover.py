"""The migrator of one run, as a process of its own: ``python -m amig.bench.mover PLAN``, PLAN being JSON.

Does what `amig migrate` does, and beside that looks at what the guest writes and asks what its log has cost. Prints
`amig.bench.measured.Moved` as one line, also for a migration that failed; ends with its exit code.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import msgspec
import numpy as np

from amig.bench.measured import LogCost, Moved
from amig.control.client import SocketGuest
from amig.errors import AmigError, ControlError, GuestError
from amig.events import Event, RoundEnded
from amig.guest import LogStarted, Outcome
from amig.host import guest_abi as abi
from amig.host.memory import MappedMemory
from amig.policy import Policy
from amig.session.migration import Migration

BOOT_TIMEOUT = 300.0
"""Seconds for the guest to have filled its memory."""
_POLL = 0.02


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do."""

    socket: str
    destination: str
    strategy: str
    bandwidth: float
    downtime: float
    timeout: float
    chunk: int
    chunk_span: int | None = None
    settle: float = 1.0
    """Seconds to look at the guest before it is moved."""

    def policy(self) -> Policy:
        """Return what the migration is to keep to; a run that does not converge is given up."""
        return Policy(
            bandwidth=self.bandwidth,
            downtime=self.downtime,
            timeout=self.timeout,
            max_rounds=1_000_000,
            chunk=self.chunk,
            chunk_span=self.chunk_span,
            dirty_log=self.strategy,
            verify="off",  # the published figures are those of a migration that compares nothing,
            streams=1,  # over one connection
        )


class MeasuredGuest(SocketGuest):
    """A guest whose progress is looked at, in the memory that is mapped anyway, when a migration's phases begin."""

    log_start_s = 0.0
    cost: LogCost | None = None
    began: tuple[float, int, int] | None = None
    paused: tuple[float, int, int] | None = None

    def look(self) -> tuple[float, int, int]:
        """Return the time, the pages written so far, and those given up."""
        cpus = abi.parse_cpus(self.low_memory(), self.info.vcpus)
        return time.monotonic(), int(cpus["writes"].sum()), int(cpus["skipped"].sum())

    def low_memory(self) -> Any:
        """Return the memory at guest-physical 0. Raises `GuestError` when there is none."""
        slot = next((s for s in self.info.memory.slots if s.guest_phys == 0 and s.size >= abi.SHARED_END), None)
        if slot is None:
            raise GuestError("the guest has no memory at its beginning: it is not amig's image")
        return self.memory.pages(slot.region).reshape(-1)[slot.offset : slot.offset + slot.size]

    async def running(self) -> None:
        """Wait until the guest's workload runs. Raises `GuestError`."""
        low = self.low_memory()
        deadline = time.monotonic() + BOOT_TIMEOUT
        while True:
            if abi.present(low):
                status = abi.parse_status(low)
                if status["state"] in (abi.State.ERROR, abi.State.FAULT):
                    raise GuestError(f"the guest can't work: {bytes(status['message']).decode(errors='replace')}")
                ready = abi.parse_cpus(low, self.info.vcpus)["state"] == abi.State.RUNNING
                if status["state"] == abi.State.RUNNING and np.all(ready):
                    return
            if time.monotonic() > deadline:
                raise GuestError(f"the guest's workload did not start within {BOOT_TIMEOUT:g} s")
            await asyncio.sleep(_POLL)

    async def log_start(self, strategy: str | None, *, unsafe: bool = False, apart: bool = False) -> LogStarted:
        """See `SocketGuest.log_start`."""
        self.began = self.look()
        started = await super().log_start(strategy, unsafe=unsafe, apart=apart)
        self.log_start_s = time.monotonic() - self.began[0]
        return started

    async def pause(self) -> None:
        """See `SocketGuest.pause`."""
        self.paused = self.look()
        await super().pause()

    async def release(self, migration: str, outcome: Outcome) -> None:
        """Ask what the log has cost before the host goes."""
        self.cost = await self._ask_cost()
        await super().release(migration, outcome)

    async def log_stop(self) -> None:
        """The same, where the migration has failed."""
        if self.cost is None and self.began is not None:
            self.paused = self.paused or self.look()
            self.cost = await self._ask_cost()
        await super().log_stop()

    async def _ask_cost(self) -> LogCost | None:
        try:
            is_ = await self.log_counters()
        except ControlError:
            return None
        return LogCost(
            syncs=is_.syncs,
            gets=is_.gets,
            get_ms=is_.get_ns / 1e6,
            clears=is_.clears,
            clear_ms=is_.clear_ns / 1e6,
            pages_cleared=is_.pages_cleared,
            ring_full=is_.ring_full,
        )


async def move(plan: Plan) -> Moved:
    """Wait for the guest, look at it for a while, move it. Raises `AmigError` when it never came to a migration."""
    guest = await MeasuredGuest.connect(plan.socket, map_memory=MappedMemory.from_fds, client="amig bench")
    assert isinstance(guest, MeasuredGuest)  # noqa: S101 - `connect` makes what it is called on
    try:
        await guest.running()
        before = guest.look()
        await asyncio.sleep(plan.settle)
        now = guest.look()
    except BaseException:
        await guest.close()
        raise
    rounds: list[tuple[int, int, float, float]] = []

    def on_event(event: Event) -> None:
        if isinstance(event, RoundEnded) and len(rounds) < 10_000:
            rounds.append((event.pages, event.remaining, event.seconds, event.bytes_per_s))

    migration = Migration(guest, plan.destination, plan.policy(), on_event=on_event)
    await migration.__aenter__()
    try:
        result = await migration.result()
    except BaseException:
        migration.cancel()
        await migration.result()
        raise
    began, paused = guest.began or now, guest.paused or guest.began or now
    return Moved(
        result=result,
        idle_rate=(now[1] - before[1]) / (now[0] - before[0]),
        rate=(paused[1] - began[1]) / max(paused[0] - began[0], 1e-9),
        skipped=paused[2] - began[2],
        log_start_ms=guest.log_start_s * 1e3,
        rounds=tuple(rounds),
        log=guest.cost,
    )


def main() -> None:
    """Run the migrator."""
    from amig.cli import say
    from amig.cli.loop import run

    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    try:
        say.json_line(run(move(plan)))
    except AmigError as error:
        say.json_line({"event": "failed", "error": str(error)})
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
