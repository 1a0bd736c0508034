"""SIGKILL for the migrator, the source's host and the destination's host, at every frame of a migration.

Real processes, on KVM where it is usable. After each: never two copies, the operator is told, what was killed and is
started again with the same command does the right thing, and the guest that runs finds its memory intact.
"""

from __future__ import annotations

import asyncio
import enum
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import NamedTuple

import pytest

from amig.control.replies import StatusIs
from amig.errors import AmigError, HostError
from amig.host.attach import open_control
from amig.host.record import state_dir
from tests.commands import Process, Said, homes, process
from tests.conftest import kvm_problem
from tests.faults.cases import SCENARIO_OF, Action, Case, D, F, Position, S, Send, destination, source
from tests.faults.relay import Relay

__all__ = ["homes"]

pytestmark = pytest.mark.usefixtures("homes")
ENGINE = ("--engine", "simulator") if kvm_problem() else ()
GUEST = ("--workload", "check", "--memory", "64MiB", "--working-set", "16MiB", "--rate", "40MB/s", *ENGINE)
FIX = 60.0


class Victim(enum.StrEnum):
    MIGRATOR = "migrator"
    SOURCE = "source"
    DESTINATION = "destination"


class Kill(NamedTuple):
    """Who is killed when this frame has come to the relay: before it is passed on, or after."""

    victim: Victim
    send: Send
    position: Position

    def __str__(self) -> str:
        return f"{self.victim}-{self.position}-{self.send}"


def all_kills() -> list[Kill]:
    return [
        Kill(victim, send, position)
        for send, scenario in SCENARIO_OF.items()
        if scenario == "move"
        for victim in Victim
        for position in (Position.BEFORE, Position.AFTER)
    ]


def kills_coming_back() -> list[Kill]:
    """While a connection that was lost is made anew: one side has gone, the other waits for it."""
    sends = [send for send, scenario in SCENARIO_OF.items() if scenario == "come-back"]
    return [
        Kill(victim, send, position)
        for send in sends
        for victim in Victim
        for position in (Position.BEFORE, Position.AFTER)
    ]


LOST = Case(*source(S.MEMORY, F.BLOCK), Action.CUT, Position.AFTER, "come-back", 4)
FEW = [
    Kill(Victim.MIGRATOR, *source(S.PREPARED, F.COMMIT), Position.AFTER),
    Kill(Victim.SOURCE, *destination(D.COMMITTED, F.RUNNING), Position.BEFORE),
    Kill(Victim.DESTINATION, *source(S.PREPARED, F.COMMIT), Position.BEFORE),
]


class Machines:
    """The processes of one case."""

    def __init__(self, relay: Relay, stack: ExitStack, port: int) -> None:
        self.relay = relay
        self._stack = stack
        self._port = port
        self.source: Process
        self.destination: Process
        self.migrator: Process

    async def start(self, *words: object) -> Process:
        return await asyncio.to_thread(self._stack.enter_context, process(*words))

    async def run(self) -> Process:
        return await self.start("run", "a", *GUEST, "--json")

    async def receive(self) -> Process:
        where = f"tcp://127.0.0.1:{self._port}"
        return await self.start("receive", where, "--name", "b", "--json", "--keep", "3s")

    async def both(self) -> tuple[str, str]:
        """What the two guests do; never both run."""
        states = await state("a"), await state("b")
        assert states != ("running", "running"), "two copies run"
        return states


async def status(name: str) -> StatusIs | None:
    """Return a host's status; None where there is no host."""
    try:
        async with await open_control(name) as control:
            return await control.status()
    except (AmigError, OSError):
        return None


async def state(name: str) -> str:
    found = await status(name)
    return "gone" if found is None else str(found.state)


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + FIX
    while not await condition():
        assert time.monotonic() < deadline, f"this did not happen in time: {what}"
        await asyncio.sleep(0.05)


async def ended(one: Process) -> Said:
    return await asyncio.to_thread(one.end)


@asynccontextmanager
async def machines(*faults: Case) -> AsyncIterator[Machines]:
    with ExitStack() as stack:
        relay = Relay(("127.0.0.1", 0), *faults)
        here = Machines(relay, stack, 0)
        here.source, here.destination = await asyncio.gather(here.run(), here.receive())
        await asyncio.to_thread(here.source.until, '"running"')
        await asyncio.to_thread(here.destination.until, '"listening"')
        here._port = int(here.destination.said[0]["listening"].rpartition(":")[2])
        relay.target = ("127.0.0.1", here._port)
        async with relay:
            yield here


async def survives(kill: Kill, *faults: Case) -> None:
    """Play it, with a connection that is lost, and made anew, first, where ``faults`` say so."""
    async with machines(*faults) as here:
        killed = asyncio.Event()

        async def strike() -> None:
            victim = {Victim.MIGRATOR: here.migrator, Victim.SOURCE: here.source, Victim.DESTINATION: here.destination}
            victim[kill.victim].send(signal.SIGKILL)
            killed.set()  # now: the end of its connection may cancel us
            await asyncio.to_thread(victim[kill.victim].popen.wait)

        here.relay.on(kill.send, strike, after=kill.position is Position.AFTER)
        here.migrator = await here.start(
            *("migrate", "a", here.relay.address, "--downtime", "2s", "--streams", "1", "--json"),
            *("--connect-timeout", "2s", "--handover-timeout", "2s", "--reconnect", "2s" if faults else "0s"),
        )
        said = await ended(here.migrator)
        assert killed.is_set(), f"the frame never came: {said}"
        told(kill, said, await here.both())
        await here.relay.drop()
        await AFTER[kill.victim](here)
        states = await here.both()
        for name, how in zip("ab", states, strict=True):
            if how == "running":
                await intact(here, name)

        async def nothing_arrives() -> bool:
            return ".arriving" not in {path.suffix for path in (state_dir() / "handover").glob("*")}

        await until(nothing_arrives, "what came is thrown away")


def told(kill: Kill, said: Said, states: tuple[str, str]) -> None:
    """What a migrator that lives says is enough to go by."""
    if kill.victim is Victim.MIGRATOR:
        return
    if said.code == 0:
        assert kill.victim is Victim.DESTINATION or states[1] == "running"
        assert states[0] != "running"
    else:
        assert said.err.startswith("amig: ") or '"error"' in said.out
        if kill.victim is Victim.DESTINATION and states[0] != "running":
            assert "amig resolve a" in said.err + said.out, said


async def migrator_gone(here: Machines) -> None:
    """The source goes on, or lets go: nobody has to do anything."""

    async def one() -> bool:
        return sorted(await here.both()) in (["incoming", "running"], ["gone", "running"])

    await until(one, "exactly one copy runs")


async def source_gone(here: Machines) -> None:
    """`amig run` is started again with the same command."""

    async def rests() -> bool:
        return await state("b") in ("running", "incoming")

    await until(rests, "the destination runs it or waits for another")
    again = await here.run()
    if await state("b") == "running":
        said = await ended(again)
        assert said.code == HostError.exit_code, "a second copy was booted"
        assert "moved to" in said.err
    else:
        await asyncio.to_thread(again.until, '"running"')
    await here.both()


async def destination_gone(here: Machines) -> None:
    """`amig receive` is started again with the same command."""
    await here.receive()

    async def rests() -> bool:
        return await state("a") in ("running", "gone") and await state("b") == "incoming"

    await until(rests, "the source runs it, or knows that it ran there")
    if await state("a") == "gone":
        assert '"moved"' in (await ended(here.source)).out


AFTER = {Victim.MIGRATOR: migrator_gone, Victim.SOURCE: source_gone, Victim.DESTINATION: destination_gone}


async def intact(here: Machines, name: str) -> None:
    """The guest verifies all its memory, and nothing logs."""
    said = await ended(await here.start("verify", name))
    assert said.code == 0, said

    async def quiet() -> bool:
        found = await status(name)
        return found is not None and not found.log_users and found.migration is None

    await until(quiet, "nobody logs")


@pytest.mark.parametrize("kill", FEW, ids=str)
async def test_a_process_is_killed_where_it_hurts_most(kill: Kill) -> None:
    await survives(kill)


async def test_the_migrator_is_killed_while_the_destination_keeps_what_it_has() -> None:
    await survives(Kill(Victim.MIGRATOR, *source(S.IDLE, F.RESUME), Position.BEFORE), LOST)


@pytest.mark.faults
@pytest.mark.parametrize("kill", kills_coming_back(), ids=str)
async def test_a_process_is_killed_while_a_connection_is_made_anew(kill: Kill) -> None:
    await survives(kill, LOST)


@pytest.mark.faults
@pytest.mark.parametrize("kill", all_kills(), ids=str)
async def test_a_process_is_killed_at_any_frame(kill: Kill) -> None:
    await survives(kill)
