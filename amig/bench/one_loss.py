"""One migration of a guest that checks its own memory, in company, and what became of everybody's pages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from amig.bench import backend, hosts
from amig.bench.company import Company, display, host_writes, keeping, meter
from amig.bench.counting import Copies, CountingGuest
from amig.bench.processes import Processes
from amig.cli.verdict import until, verdict_of
from amig.errors import AmigError, GuestError, MigrationError
from amig.events import Result
from amig.host.attach import open_control, open_guest
from amig.host.memory import MappedMemory
from amig.memory import PAGE_SIZE, MemoryMap
from amig.policy import Policy
from amig.session.migration import Migration

MIB = 1 << 20
MEMORY, WORKING_SET = 64 * MIB, 24 * MIB
OWN_FIRST, OWN_PAGES = 48 * MIB // PAGE_SIZE, 512
"""Guest-physical pages of the device backend, above all that the guest uses."""
SHOWN_PAGES = 1024
"""Pages of the working set that the display looks at."""
WORDS = f"workload=check ws={WORKING_SET} rate=150MB/s report=0"
POLICY = {"bandwidth": 300e6, "downtime": 0.03, "chunk": 256 << 10, "timeout": 1.5, "on_timeout": "switch"}
"""Several rounds of small chunks; on a busy machine it moves when it has had many of them."""
_VERDICT_TIMEOUT = 30.0
_ACK_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Who is there beside the migration."""

    users: bool = False
    """A dirty-rate meter and a slow display."""
    sources: bool = False
    """A device backend and writes from the host's side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moving:
    """What to do."""

    number: int
    strategy: str
    stage: Stage
    room: Path
    """For files."""
    initially_set: bool = True
    ring: int = 0


@dataclass(slots=True, kw_only=True)
class Moved:
    """What came of it."""

    mismatches: int = 0
    """Pages that the guest found wrong, over there."""
    words: tuple[str, ...] = ()
    answered: bool = True
    """Whether the guest was able to say anything."""
    backend_lost: int = 0
    host_lost: int = 0
    sent: int = 0
    copies: Copies = field(default_factory=Copies)
    samples: int = 0
    looks: int = 0
    touched: int = 0
    trouble: list[str] = field(default_factory=list)

    @property
    def damaged(self) -> bool:
        """Whether anything at all was lost."""
        return bool(self.mismatches or self.backend_lost or self.host_lost or not self.answered)


async def move(moving: Moving, processes: Processes) -> Moved:
    """Do it. Raises an `AmigError` when the guest did not move; all hosts have ended then, too."""
    source, destination = f"from{moving.number}", f"to{moving.number}"
    command = hosts.HostGuest(
        name=source,
        memory=MEMORY,
        append=WORDS,
        initially_set=moving.initially_set,
        dirty_ring=moving.ring,
    )
    moved = Moved()
    from_ = await processes.source(command)
    try:
        to = await processes.destination(hosts.Receive(name=destination))
        try:
            await _move(moving, processes, from_.socket, to, moved)
        finally:
            moved.words = (await processes.destination(hosts.End(name=destination))).words
    finally:
        await processes.source(hosts.End(name=source))
    return moved


async def _move(moving: Moving, processes: Processes, socket: str, to: hosts.Answer, moved: Moved) -> None:
    counters = moving.room / "counters"
    counters.write_bytes(bytes(8 * WORKING_SET // PAGE_SIZE))
    guest = await CountingGuest.connect(socket, map_memory=MappedMemory.from_fds, client="amig bench")
    assert isinstance(guest, CountingGuest)  # noqa: S101 - `connect` makes what it is called on
    try:
        await guest.running()
        guest.count(counters, moving.strategy)
    except BaseException:
        await guest.close()
        raise
    told = Company()
    log_on = asyncio.Event()
    guest.on_log = log_on.set
    policy = Policy(**POLICY, dirty_log=moving.strategy, may_lose_pages=True, verify="off")  # type: ignore[arg-type]
    generations: tuple[int, ...] = ()
    async with _device(moving.stage, processes, guest, socket, counters, moved) as device:
        people = _people(moving.stage, guest, socket, log_on, told)
        async with keeping(*people, told=told):
            result = await _migrate(Migration(guest, to.address, policy))
        if moving.stage.sources:
            generations = await device()
    if result.status != "completed":
        raise MigrationError(result.error or "the migration was cancelled")
    assert guest.classes is not None  # noqa: S101 - counted
    moved.copies = guest.classes.copies
    moved.sent = result.pages.sent
    moved.samples, moved.looks = told.samples, told.looks
    moved.trouble += told.trouble
    await _look(to.socket, generations, told, moved)


def _people(
    stage: Stage, guest: CountingGuest, socket: str, log_on: asyncio.Event, told: Company
) -> list[asyncio.Task[None]]:
    """Start whoever shares the guest; users join the log when it is on, for the migration says how it is kept."""
    people: list[asyncio.Task[None]] = []
    if stage.users:
        first, pages = guest.ws_place[1], min(SHOWN_PAGES, guest.ws_pages)

        async def measure() -> None:
            await log_on.wait()
            await meter(socket, told)

        async def show() -> None:
            await log_on.wait()
            await display(socket, guest.ws_place[0], first, pages, told)

        people += [asyncio.create_task(measure(), name="meter"), asyncio.create_task(show(), name="display")]
    if stage.sources:
        people.append(asyncio.create_task(host_writes(socket, told), name="host writes"))
    return people


@asynccontextmanager
async def _device(
    stage: Stage, processes: Processes, guest: CountingGuest, socket: str, counters: Path, moved: Moved
) -> AsyncIterator:  # type: ignore[type-arg]
    """Attach the device backend for the length of the block; what is yielded asks it for what it wrote."""
    if not stage.sources:
        yield None
        return
    await processes.device(
        backend.Attach(
            socket=socket,
            counters=str(counters),
            own_first=OWN_FIRST,
            own_pages=OWN_PAGES,
            ws_first=guest.ws_page,
            ws_pages=guest.ws_pages,
        )
    )
    asked = False

    async def report() -> tuple[int, ...]:
        nonlocal asked
        asked = True
        answer = await processes.device(backend.Report())
        moved.touched = answer.touched
        return answer.generations

    try:
        yield report
    finally:
        if not asked:
            await report()


async def _migrate(migration: Migration) -> Result:
    await migration.__aenter__()
    try:
        return await migration.result()
    except BaseException:
        migration.cancel()
        await migration.result()
        raise


async def _look(socket: str, generations: tuple[int, ...], told: Company, moved: Moved) -> None:
    """See what has arrived: the guest's verdict, the backend's pages, the host's last write."""
    if generations:
        there = await open_guest(socket, client="amig bench")
        try:
            moved.backend_lost = differing(there.memory, there.info.memory, generations)
        finally:
            await there.close()
    async with await open_control(socket, client="amig bench") as control:
        verdict = await verdict_of(control, _VERDICT_TIMEOUT, pages=WORKING_SET // PAGE_SIZE)
        moved.answered = verdict.answered
        moved.mismatches = verdict.mismatches
        if told.host_writes and verdict.answered:
            with contextlib.suppress(AmigError):
                try:
                    await until(control, lambda guest: guest.gap_ack >= told.host_writes, _ACK_TIMEOUT)
                except GuestError:
                    moved.host_lost = 1


def differing(memory: object, map_: MemoryMap, generations: tuple[int, ...]) -> int:
    """Return how many of the backend's pages do not hold what it wrote last."""
    slot = next(s for s in map_.slots if s.guest_phys <= OWN_FIRST * PAGE_SIZE < s.guest_phys + s.size)
    first = OWN_FIRST + (slot.offset - slot.guest_phys) // PAGE_SIZE
    words = memory.pages(slot.region).view(np.uint64)[first : first + OWN_PAGES]  # type: ignore[attr-defined]
    pages = np.arange(OWN_PAGES, dtype=np.uint64)
    written = np.array(generations, np.uint64)
    expected = np.where(written > 0, written << np.uint64(32) | pages, np.uint64(0))
    return int((words != expected[:, None]).any(axis=1).sum())
