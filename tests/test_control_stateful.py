"""A host and control clients that ask for anything in any order, and say what is no request at all.

Whatever one of them does, an operator is answered, and when they have gone all is undone that was theirs: the dirty log
is off, a pause of theirs is over, no descriptor is left. The guest stands still only when an operator wanted that, or
when it was durably handed over.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from amig.control import requests as rq
from amig.control import types
from amig.control.operator import ControlClient
from amig.control.take import OP_TAKE, REQUEST
from amig.errors import ControlError
from amig.guest import Outcome, RunState
from amig.host import backends
from tests.fakes import FakeMachine, hosted_guest, serving, until
from tests.fuzz.control import ID, Client

REQUESTS: list[types.Request] = [
    rq.LogStart(),
    rq.LogStart(strategy="exact"),
    rq.LogStart(strategy="blind"),
    rq.LogStart(strategy="no such"),
    rq.Sync(),
    rq.GiveBack(region=0, first=0, words=bytes(8)),
    rq.GiveBack(region=9, first=2**60, words=b"odd"),
    rq.LogCounters(),
    rq.LogStop(),
    rq.MigrationBegin(migration=ID, destination="tcp://b:1"),
    rq.MigrationProgress(progress=types.Progress()),
    rq.MigrationEnd(status="failed"),
    rq.Pause(),
    rq.Resume(),
    rq.Save(),
    rq.Prepare(migration=ID, destination="tcp://b:1", peer="b"),
    rq.Commit(migration=ID),
    rq.Commit(migration="f" * 32),
    rq.Release(migration=ID, outcome=Outcome.DISCARDED),
    rq.Release(migration="f" * 32, outcome=Outcome.RUNNING),
    rq.Leave(),
    rq.Status(),
    rq.Cancel(),
    rq.GuestAsk(what="verify"),
    rq.ConsoleAttach(),
    rq.ConsoleInput(data=b"x"),
    rq.ConsoleDetach(),
    rq.VhostAttach(),
    rq.VhostStopped(number=1),
    rq.VhostDetach(),
]
CLIENTS = st.integers(0, 1)


class Host(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.paused = False
        self.ids = 1
        self.files = len(os.listdir("/proc/self/fd"))
        self.clients: list[Client | None] = [None, None]
        self.runner.run(self.begin())

    async def begin(self) -> None:
        self.stack = AsyncExitStack()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.hosted = await self.stack.enter_async_context(hosted_guest(folder))
        self.path = folder / "s"
        self.server = await self.stack.enter_async_context(serving(self.hosted, self.path))
        assert isinstance(self.hosted.machine, FakeMachine)
        self.machine = self.hosted.machine

    def client(self, number: int) -> Client:
        found = self.clients[number]
        if found is None or found.gone:
            if found is not None:
                found.close()
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(os.fspath(self.path))
            found = self.clients[number] = Client(sock)
        return found

    async def rest(self, client: Client) -> None:
        for _ in range(8):
            await asyncio.sleep(0.0005)
            client.hear()

    # --- what clients do ---------------------------------------------------------------------------------------------

    @rule(number=CLIENTS, requests=st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=4), hello=st.booleans())
    def ask(self, number: int, requests: list[types.Request], hello: bool) -> None:
        first: list[types.Request] = [rq.Hello(version=types.VERSION, client="any")] if hello else []
        client = self.client(number)
        for request in first + requests:
            self.ids += 1
            frame = msgspec.msgpack.encode(msgspec.structs.replace(request, id=self.ids))
            client.say(len(frame).to_bytes(4, "little") + frame)
        self.runner.run(self.rest(client))

    @rule(number=CLIENTS, data=st.binary(max_size=64), length=st.integers(0, 2**32 - 1) | st.just(4))
    def say_noise(self, number: int, data: bytes, length: int) -> None:
        client = self.client(number)
        client.say(length.to_bytes(4, "little") + data)
        self.runner.run(self.rest(client))

    @rule(number=CLIENTS, count=st.integers(1, 80))
    def send_descriptors(self, number: int, count: int) -> None:
        client = self.client(number)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            client.say(b"\1\0\0\0\xc0", [null] * count)
        finally:
            os.close(null)
        self.runner.run(self.rest(client))

    @rule(
        number=CLIENTS,
        region=st.sampled_from([0, 7, 9, 2**32 - 1]),
        first=st.sampled_from([0, 1, 64, 192, 2**63, 2**64 - 64]),
        count=st.sampled_from([0, 1, 8, 64, 200, 2**64 - 64]),
        generation=st.integers(0, 2),
    )
    def take(self, number: int, region: int, first: int, count: int, generation: int) -> None:
        client = self.client(number)
        client.packet(REQUEST.pack(OP_TAKE, region, first, count, generation, 1))
        self.runner.run(self.rest(client))

    @rule(number=CLIENTS)
    def hang_up(self, number: int) -> None:
        client, self.clients[number] = self.clients[number], None
        if client is not None:
            client.close()

    @rule()
    def operator_pauses_or_resumes(self) -> None:
        # Not a precondition: what is drawn must not depend on how far the host has come.
        if self.hosted.state in (RunState.RUNNING, RunState.PAUSED):
            self.paused = not self.paused
            self.runner.run(self.operate())

    async def operate(self) -> None:
        async with await ControlClient.connect(self.path) as operator:
            try:
                await (operator.pause() if self.paused else operator.resume())
            except ControlError as refused:
                # A client has become a device backend, and does not stop when it is told to: the guest runs on.
                if not self.paused or refused.code != "backend":
                    raise
                self.paused = False

    # --- what holds --------------------------------------------------------------------------------------------------

    @invariant()
    def an_operator_is_answered(self) -> None:
        self.runner.run(self.look())

    async def look(self) -> None:
        async with asyncio.timeout(30):
            async with await ControlClient.connect(self.path) as operator:
                while True:  # what clients have asked for may still be under way
                    state = (await operator.status()).state
                    if state is self.hosted.state and (state is RunState.RUNNING or not self.machine.running):
                        return

    def teardown(self) -> None:
        for client in self.clients:
            if client is not None:
                client.close()
        try:
            self.runner.run(self.leave())
        finally:
            self.runner.close()
        assert len(os.listdir("/proc/self/fd")) <= self.files, "descriptors are left open"

    async def leave(self) -> None:
        async with self.stack:
            await until(lambda: self.server.connections == 0, "all connections have ended")
            assert not self.machine.logging, "the dirty log was left on"
            if self.hosted.state is not RunState.COMMITTED:
                assert self.hosted.state is (RunState.PAUSED if self.paused else RunState.RUNNING)
                assert self.machine.running is not self.paused


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "STOP_TIMEOUT", 0.05)


def test_an_operator_is_answered_while_a_backend_does_not_stop() -> None:
    """What the search below comes to now and then."""
    state = Host()
    state.ask(number=0, requests=[rq.VhostAttach()], hello=True)
    state.operator_pauses_or_resumes()
    assert not state.paused
    state.an_operator_is_answered()
    state.hang_up(0)
    state.teardown()


def test_whatever_clients_do_the_operator_is_answered_and_all_is_undone() -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Host, settings=settings(max_examples=10, stateful_step_count=12, deadline=None, suppress_health_check=checks)
    )
