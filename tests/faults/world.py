"""Two hosts, a checking guest and a migration between them, all real but the processor; and what must hold after it.

The whole of amig is in it as `amig run`, `amig migrate` and `amig receive` use it: control sockets, durable records,
connections over loopback. The guest is simulated, with a check of its own memory, so that a case takes a tenth of a
second.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import amig
from amig.errors import AmigError, InDoubt
from amig.events import Event, Notice
from amig.guest import Outcome, RunState
from amig.host.hosted import HostedGuest
from amig.host.incoming import LocalIncoming
from amig.host.names import runtime_dir
from amig.host.record import state_dir
from amig.host.service import HostService
from amig.session import asking, doubt, inbound, peer, questions
from amig.session.inbound import Phase
from amig.sim.guest import SimMachine
from amig.transport import LinkOptions, sock
from tests.faults.cases import Action, Case
from tests.faults.relay import Relay
from tests.moving import alive, hosting, machine_of, move, until, verdict

GUEST = "workload=check ws=2M rate=8M report=0"
MEMORY = 8 << 20
CHUNK = 256 << 10
PATIENCE = 0.6
"""Seconds for everything that has a time limit, on both sides."""
LIMITS = (
    (inbound, "HANDSHAKE_TIMEOUT"),
    (inbound, "COMMIT_TIMEOUT"),
    (inbound, "LAST_WORD_TIMEOUT"),
    (questions, "PATIENCE"),
    (asking, "PATIENCE"),
    (peer, "_ABORT_TIMEOUT"),
    (sock, "LINGER"),
)
RECONNECT = 5.0
KEEP = 6.0
"""Seconds: for a busy machine; a connection that was lost is back within a tenth of one."""
FIX = 20.0
"""Seconds after which a case has failed."""


class Together:
    """Watches over all machines: two that run at the same time are what must never be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running: set[int] = set()
        self.most = 0
        self._lock = threading.Lock()
        resume, pause, close = SimMachine.resume, SimMachine.pause, SimMachine.close

        def resumes(machine: SimMachine) -> None:
            with self._lock:
                self.running.add(id(machine))
                self.most = max(self.most, len(self.running))
            resume(machine)

        def rests(call: Callable[[SimMachine], None]) -> Callable[[SimMachine], None]:
            def rest(machine: SimMachine) -> None:
                call(machine)
                with self._lock:
                    self.running.discard(id(machine))

            return rest

        monkeypatch.setattr(SimMachine, "resume", resumes)
        monkeypatch.setattr(SimMachine, "pause", rests(pause))
        monkeypatch.setattr(SimMachine, "close", rests(close))


class Failing(LocalIncoming):
    """A destination that fails at one step."""

    step = ""

    def _fail(self, step: str) -> None:
        if step == self.step:
            raise AmigError(f"this host is made to fail at {step}")

    async def build(self, **arguments: object) -> str:  # type: ignore[override]
        self._fail("build")
        return await super().build(**arguments)  # type: ignore[arg-type]

    def pages(self, region: int):  # type: ignore[no-untyped-def]
        self._fail("pages")
        return super().pages(region)

    async def load(self, state: bytes) -> None:
        self._fail("load")
        await super().load(state)

    async def commit(self, migration: str) -> None:
        self._fail("commit")
        await super().commit(migration)


@dataclass
class World:
    """One case while it is played."""

    source: HostService
    reception: amig.Reception
    relay: Relay
    migration: amig.Migration | None = None
    policy: amig.Policy = field(default_factory=amig.Policy)
    notes: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    attempts: int = 0
    operator_decides: bool = False
    stopped: bool = False

    def fail_at(self, step: str) -> None:
        """Have the next attempt fail at the destination; later ones do not."""
        hosted, service = self.reception.service.hosted, self.reception.service
        plain = service.incoming

        def incoming(builders):  # type: ignore[no-untyped-def]
            service.incoming = plain  # type: ignore[method-assign]
            failing = Failing(hosted, builders)
            failing.step = step
            return failing

        service.incoming = incoming  # type: ignore[method-assign]

    def hear(self, event: Event) -> None:
        """What the migrator tells the operator besides its result."""
        if isinstance(event, Notice):
            self.said.append(event.text)

    def reconnects(self, keep: float = KEEP) -> None:
        """From now on a connection that is lost is made anew; one that is silent counts as lost soon."""
        self.policy = dataclasses.replace(
            self.policy, reconnect=RECONNECT, keepalive=PATIENCE / 4, stall=PATIENCE, handover_timeout=RECONNECT / 2
        )
        self.reception._keep, self.reception._keepalive, self.reception._stall = keep, PATIENCE / 4, PATIENCE

    def pings(self) -> None:
        """Both sides soon ask whether the other is there, and wait long for the answer."""
        self.policy = dataclasses.replace(self.policy, keepalive=0.02)
        self.reception._keepalive = 0.02

    async def cancel(self) -> None:
        """An operator cancels."""
        assert self.migration is not None
        self.migration.cancel()
        await asyncio.sleep(0.05)

    async def stop_receiver(self) -> None:
        """An operator ends `amig receive`."""
        self.stopped = True
        serving = self.reception._serving
        assert serving is not None
        serving.cancel()
        await asyncio.sleep(0.05)

    @property
    def hosts(self) -> tuple[HostedGuest, HostedGuest]:
        return self.source.hosted, self.reception.service.hosted


def traces() -> dict[str, object]:
    """What a case must not leave behind."""
    mine = asyncio.current_task()
    return {
        "descriptors": sorted(_descriptors()),
        "threads": sorted(t.name for t in threading.enumerate() if not t.name.startswith("asyncio_")),
        "tasks": sorted(t.get_name() for t in asyncio.all_tasks() if t is not mine and not t.done()),
        "sockets": sorted(p.name for p in runtime_dir().iterdir()) if runtime_dir().exists() else [],
    }


def _descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{fd}")
            found.append(name.partition(":")[0] if name.startswith(("socket:", "pipe:")) else name)
    return [name for name in found if not name.endswith("/fd")]


async def assert_nothing_left(before: dict[str, object]) -> None:
    deadline = time.monotonic() + 10
    while more := _more(traces(), before):
        if time.monotonic() > deadline:
            raise AssertionError(f"left behind: {'; '.join(more)}")
        gc.collect()  # only now: it takes longer than a whole case
        await asyncio.sleep(0.05)
    left = [path.name for path in (state_dir() / "handover").glob("*")]
    assert not [name for name in left if name.endswith(".arriving")], left


def _more(now: dict[str, object], before: dict[str, object]) -> list[str]:
    found = []
    for kind, names in now.items():
        more = Counter(names) - Counter(before[kind])  # type: ignore[call-overload]
        if more:
            found.append(f"{kind} {dict(more)}")
    return found


@asynccontextmanager
async def world(monkeypatch: pytest.MonkeyPatch, *faults: Case) -> AsyncIterator[World]:
    """Host a guest, wait for one, and put a relay in between."""
    # Whoever keeps a record of the log (pytest does) keeps the error in it, and with that all it holds.
    monkeypatch.setattr(logging.getLogger("amig.session.reception"), "level", logging.ERROR)
    logging.getLogger("amig.session.reception").manager._clear_cache()  # type: ignore[attr-defined]
    for module, name in LIMITS:
        monkeypatch.setattr(module, name, PATIENCE)
    monkeypatch.setattr(doubt, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(doubt, "MAX_PAUSE", 0.2)
    together = Together(monkeypatch)
    phases: list[Phase] = []
    async with hosting(GUEST, engine="simulator", memory=MEMORY) as source:
        async with amig.Reception(
            "tcp://127.0.0.1:0", name="there", on_phase=phases.append, keepalive=FIX, stall=FIX
        ) as reception:
            host, _, port = reception.address.removeprefix("tcp://").rpartition(":")
            async with Relay((host, int(port)), *faults) as relay:
                here = World(source=source, reception=reception, relay=relay, phases=phases)
                here.policy = amig.Policy(
                    connect_timeout=PATIENCE,
                    handover_timeout=PATIENCE,
                    downtime=0.05,
                    chunk=CHUNK,
                    reconnect=0,
                    keepalive=FIX,
                    stall=FIX,
                )
                async with doubt.watching(source.hosted, LinkOptions(), here.notes.append):
                    yield here
    assert together.most <= 1, "two copies ran at the same time"


async def play(here: World, attach: Callable[[World], Awaitable[None]]) -> amig.Result:
    """Migrate, see that what the operator is told is true, heal the network, and see that exactly one copy runs."""
    await attach(here)
    async with asyncio.timeout(FIX):
        here.migration = amig.Migration(here.source.name, here.relay.address, here.policy, on_event=here.hear)
        with contextlib.suppress(AmigError):
            async with here.migration:
                await _until_done(here)
        result = await here.migration.result()
        told(here, result)
        await here.relay.drop()
        await settled(here)
        await one_runs(here, result)
    return result


async def _until_done(here: World) -> None:
    """Wait for the end. A link that went silent before COMMIT is noticed by the operator, who cancels."""
    assert here.migration is not None
    done = asyncio.ensure_future(here.migration.result())
    try:
        while not done.done():
            silent = any(case.action is Action.SILENCE for case in here.relay.fired) and not here.policy.reconnect
            await asyncio.wait([done], timeout=0.2 if silent else 0.02)
            if silent and not done.done():
                here.migration.cancel()
    finally:
        done.cancel()


def told(here: World, result: amig.Result) -> None:
    """What the migrator says right after its end is true, and enough to go by."""
    source, destination = here.hosts
    error = here.migration.error if here.migration is not None else None
    if result.status == "completed":
        assert destination.state is RunState.RUNNING
        if source.state is RunState.COMMITTED:  # it could not put that on record, and asks again
            assert any("its old host says" in text for text in here.said)
        else:
            assert source.state is RunState.STOPPED
    elif isinstance(error, InDoubt):
        for part in ("must not run here", "amig resolve", source.name, "--run-here", "--discard"):
            assert part in str(error)
    elif source.state is RunState.COMMITTED:  # the host asks by itself, and says so
        assert source.in_doubt is not None
    else:
        assert source.state is RunState.RUNNING, (source.state, result)
        assert destination.state is not RunState.RUNNING
        assert str(error)


async def settled(here: World) -> None:
    """Both sides come to rest: no attempt under way, no handover in doubt."""
    source, destination = here.hosts

    def nobody_knows() -> bool:
        return here.operator_decides and any("nothing is known here" in note for note in here.notes)

    await until(lambda: source.in_doubt is None or nobody_knows(), "the handover is settled, or nobody knows", FIX)
    if source.in_doubt is not None:
        there = destination.state is RunState.RUNNING
        assert any("--run-here" in note and "--discard" in note for note in here.notes)
        await source.release(source.in_doubt.migration, Outcome.RUNNING if there else Outcome.DISCARDED)
    await until(lambda: source.in_doubt is None, "the handover is settled", FIX)
    await until(
        lambda: here.stopped or destination.state is RunState.RUNNING or not destination.has_machine,
        "the destination has let go of what came",
        FIX,
    )


async def one_runs(here: World, result: amig.Result) -> None:
    """Exactly one copy runs, its memory is intact, nothing logs; and if it stayed it can be moved after all."""
    source, destination = here.hosts
    here_now = source.state is RunState.RUNNING
    there_now = destination.state is RunState.RUNNING
    assert here_now != there_now, (source.state, destination.state, result)
    service = here.source if here_now else here.reception.service
    await intact(service)
    if here_now and not here.stopped:
        again = await move(here.source, here.reception.address, amig.Policy(downtime=5))
        assert again.status == "completed", again
        await here.reception.arrived()
        await intact(here.reception.service)


async def intact(service: HostService) -> None:
    """The guest gets on, its memory is as it wrote it, and its dirty log is off."""
    await until(lambda: service.hosted.hub.strategy is None, "the dirty log is off")
    await alive(machine_of(service))
    assert await verdict(machine_of(service)) == 0


__all__ = ["Path", "World", "assert_nothing_left", "play", "traces", "world"]
