"""The example service: several migrations at once in somebody else's event loop, told, steered, survived."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from amig.guest import RunState
from tests.moving import CHECK, homes, hosting, machine_of, receiving, until, verdict

__all__ = ["homes"]

PATH = Path(__file__).parent.parent / "examples" / "service.py"
ENGINES = ["simulator", pytest.param("kvm", marks=pytest.mark.kvm)]

spec = importlib.util.spec_from_file_location("example_service", PATH)
assert spec is not None
assert spec.loader is not None
service = importlib.util.module_from_spec(spec)
sys.modules["example_service"] = service
spec.loader.exec_module(service)


class Caller:
    """A client of the service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def say(self, line: str) -> None:
        self.writer.write(f"{line}\n".encode())

    async def hear(self, wanted: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        while True:
            value = json.loads(await asyncio.wait_for(self._reader.readline(), 60))
            if wanted(value):
                return value

    async def result(self, id: str | None = None) -> dict[str, Any]:
        return await self.hear(lambda value: value["event"] == "result" and id in (None, value["id"]))


@asynccontextmanager
async def calling(path: Path) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


def answers(path: Path) -> bool:
    """Whether somebody listens there: between bind and listen the socket is there, and refuses."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def path(homes: Path) -> Path:
    return homes / "mover.sock"


@pytest.mark.parametrize("engine", ENGINES)
async def test_two_guests_move_at_once_and_both_are_told_of(path: Path, engine: str) -> None:
    async with (
        hosting(CHECK, engine=engine) as one,
        hosting(CHECK, engine=engine) as two,
        receiving() as there,
        receiving() as elsewhere,
        service.Mover(str(path)),
        calling(path) as caller,
    ):
        assert path.stat().st_mode & 0o777 == 0o600
        caller.say(f"move {one.name} {there.address} bandwidth=40MB/s streams=2")
        caller.say(f"move {two.name} {elsewhere.address} bandwidth=40MB/s downtime=200ms")
        first = (await caller.hear())["id"]
        second = (await caller.hear(lambda value: value["id"] != first))["id"]
        caller.say("list")
        moves = (await caller.hear(lambda value: value["event"] == "list"))["moves"]
        assert set(moves) == {first, second}, "both are under way"
        for id in (first, second):
            caller.say(f"limit {id} bandwidth=unlimited downtime=2s")
        results = [await caller.result() for _ in range(2)]
        assert {result["id"] for result in results} == {first, second}
        assert {result["status"] for result in results} == {"completed"}
        for reception in (there, elsewhere):
            await reception.arrived()
            assert await verdict(machine_of(reception.service)) == 0


async def test_a_move_is_cancelled_by_its_id(path: Path) -> None:
    async with (
        hosting(CHECK, engine="simulator") as guest,
        receiving() as there,
        service.Mover(str(path)),
        calling(path) as caller,
    ):
        caller.say(f"move {guest.name} {there.address} bandwidth=1MB/s")
        id = (await caller.hear(lambda value: value["event"] == "progress"))["id"]
        caller.say(f"cancel {id}")
        assert (await caller.hear(lambda value: value["event"] == "cancel"))["accepted"]
        assert (await caller.result(id))["status"] == "cancelled"
        assert guest.hosted.state is RunState.RUNNING
        assert await verdict(machine_of(guest)) == 0


async def test_what_fails_is_told_and_the_service_goes_on(path: Path) -> None:
    async with service.Mover(str(path)), calling(path) as caller:
        for line, part in (
            ("dance", "move NAME DESTINATION"),
            ("move a tcp://127.0.0.1:1 colour=red", "colour"),
            ("move a tcp://127.0.0.1:1 downtime=10", "unit of time"),
            ("move a tcp://127.0.0.1:1 streams=0", "streams"),
            ("cancel 123", "no migration 123"),
        ):
            caller.say(line)
            answer = await caller.hear()
            assert answer["event"] == "error"
            assert part in answer["text"]
        caller.say("move nobody tcp://127.0.0.1:1")
        result = await caller.result()
        assert result["status"] == "failed"
        assert "no guest named nobody" in result["error"]
        caller.say("list")
        assert (await caller.hear())["moves"] == {}


async def test_a_client_that_hangs_up_does_not_stop_what_it_asked_for(path: Path) -> None:
    async with hosting(CHECK, engine="simulator") as guest, receiving() as there, service.Mover(str(path)):
        async with calling(path) as caller:
            caller.say(f"move {guest.name} {there.address} bandwidth=40MB/s downtime=1s")
            await caller.hear()
        await asyncio.wait_for(there.arrived(), 60)
        assert await verdict(machine_of(there.service)) == 0


async def test_ending_the_service_keeps_guests_where_they_are(path: Path) -> None:
    async with hosting(CHECK, engine="simulator") as guest, receiving() as there:
        async with service.Mover(str(path)), calling(path) as caller:
            caller.say(f"move {guest.name} {there.address} bandwidth=1MB/s")
            await caller.hear(lambda value: value["event"] == "progress")
        assert not path.exists()
        assert guest.hosted.state is RunState.RUNNING
        assert guest.hosted.hub.strategy is None


def test_it_runs_on_uvloop(path: Path) -> None:
    async def main() -> None:
        async with (
            hosting(CHECK, engine="simulator") as guest,
            receiving() as there,
            service.Mover(str(path)),
            calling(path) as caller,
        ):
            caller.say(f"move {guest.name} {there.address}")
            assert (await caller.result())["status"] == "completed"

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_as_a_program_it_ends_in_order(path: Path) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, str(PATH), str(path), env=os.environ)
    try:
        await until(lambda: answers(path), "it listens")
        async with calling(path) as caller:
            caller.say("list")
            assert (await caller.hear())["moves"] == {}
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 30) == 0
        assert not path.exists()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
