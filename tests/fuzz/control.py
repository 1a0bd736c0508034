"""A control-socket client that says what it likes, descriptors and take packets included, to the host of a real hub.

An input is a list of actions, each a kind (u8), a length (u16) and so many bytes:

==  =================================================================================================================
0   a frame with these bytes
1   these bytes as they are
2   a frame that brings descriptors: the first byte says how many, up to 70
3   a packet on the take socket, if there is one
4   a take (region, first page, pages: the first three u32), likewise
5   wait for the answers to what was said
==  =================================================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from amig.control import requests as rq
from amig.control import server, types
from amig.control.server import _Connection
from amig.control.take import OP_TAKE, REQUEST
from amig.guest import RunState
from amig.host.hosted import HostedGuest
from amig.host.local import error_code
from amig.host.relay import ConsoleRelay
from amig.host.session import HostSession
from tests.fakes import FakeMachine, hosted_guest

from .loops import complete
from .target import SCRATCH, Mutate, Target

ID = "0123456789abcdef" * 2
_ACTION = struct.Struct("<BH")
FRAME, RAW, DESCRIPTORS, PACKET, TAKE, WAIT = range(6)
MOST_ACTIONS = 64
PATIENCE = 20.0
_LENGTH = struct.Struct("<I")
_RIGHTS = struct.calcsize("i")


class Client:
    """The other end of one control connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._take: socket.socket | None = None
        self.heard = 0
        self.gone = False

    def say(self, data: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        with contextlib.suppress(OSError):
            self._sock.sendmsg([data], rights)

    def hear(self) -> None:
        """Take what has come, and keep the take socket of a log."""
        with contextlib.suppress(OSError):
            while not self.gone:
                data, rights, _, _ = self._sock.recvmsg(1 << 16, socket.CMSG_SPACE(64 * _RIGHTS))
                self.heard += len(data)
                self.gone = not data
                for _, _, content in rights:
                    for fd in struct.unpack(f"{len(content) // _RIGHTS}i", content):
                        self._keep(fd)

    def _keep(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            taken = socket.socket(fileno=fd)
            if taken.type == socket.SOCK_SEQPACKET and self._take is None:
                taken.setblocking(False)
                self._take = taken
                return
            taken.detach()
        os.close(fd)

    def packet(self, data: bytes) -> None:
        if self._take is not None:
            with contextlib.suppress(OSError):
                self._take.send(data)
            with contextlib.suppress(OSError):
                while self._take.recv(4096):
                    pass

    def close(self) -> None:
        self._sock.close()
        if self._take is not None:
            self._take.close()


def actions(data: bytes) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    at = 0
    while at + _ACTION.size <= len(data) and len(found) < MOST_ACTIONS:
        kind, size = _ACTION.unpack_from(data, at)
        at += _ACTION.size
        found.append((kind % (WAIT + 1), data[at : at + size]))
        at += size
    return found


async def play(data: bytes) -> None:
    """Be the host of such a client; afterwards the host is as it should be."""
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        async with hosted_guest(Path(folder)) as hosted:
            machine = hosted.machine
            assert isinstance(machine, FakeMachine)
            client = await _meet(hosted, actions(data))
            assert client.heard <= (1 << 16) + 64 * len(data), "more was answered than asked"
            assert not machine.logging, "the dirty log was left on"
            assert not hosted.has_machine or hosted.machine is machine
            if hosted.state is not RunState.STOPPED:  # then it is closed by the host's owner
                running = hosted.state is RunState.RUNNING
                assert machine.running == running, f"the guest is {hosted.state}, its machine is not"
    left = len(os.listdir("/proc/self/fd")) - before
    assert not left, f"{left} descriptors are left open"


async def _meet(hosted: HostedGuest, said: list[tuple[int, bytes]]) -> Client:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    console = ConsoleRelay(hosted)
    connection = _Connection(ours, lambda outbox: HostSession(hosted, outbox, console), error_code)
    client = Client(theirs)
    async with asyncio.timeout(PATIENCE):
        serving = asyncio.create_task(connection.serve())
        try:
            for kind, content in said:
                await _act(client, kind, content, serving)
        finally:
            client.hear()
            client.close()
            await serving
    return client


async def _act(client: Client, kind: int, content: bytes, serving: asyncio.Task[None]) -> None:
    if kind == FRAME:
        client.say(_LENGTH.pack(len(content)) + content)
    elif kind == RAW:
        client.say(content)
    elif kind == DESCRIPTORS:
        count = 1 + (content[0] if content else 0) % 70
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            client.say(_LENGTH.pack(len(content[1:])) + content[1:], [null] * count)
        finally:
            os.close(null)
    elif kind == PACKET:
        client.packet(content)
    elif kind == TAKE:
        region, first, pages = struct.unpack("<3I", content[:12].ljust(12, b"\0"))
        client.packet(REQUEST.pack(OP_TAKE, region, first, pages, 1, 1))
    if kind == WAIT:
        await _rest(client, serving)
    else:
        await asyncio.sleep(0)
        client.hear()


async def _rest(client: Client, serving: asyncio.Task[None]) -> None:
    """Give the host time to answer: until it has, and has said no more for a moment."""
    quiet = 0
    for _ in range(30):
        heard = client.heard
        await asyncio.sleep(0.0003)
        client.hear()
        quiet = 0 if client.heard > heard else quiet + bool(heard)
        if quiet > 3 or serving.done():
            return


def run(data: bytes) -> None:
    assert server.LINGER < PATIENCE
    complete(play(data))


def action(kind: int, content: bytes = b"") -> bytes:
    return _ACTION.pack(kind, len(content)) + content


def mutate(data: bytes, most: int, seed: int, by: Mutate) -> bytes:
    """Change one action, or their order; now and then any of the bytes."""
    rng = random.Random(seed)
    found = actions(data)
    kind = rng.randrange(8)
    if kind == 0 or not found:
        return by(data, most)
    at = rng.randrange(len(found))
    if kind == 1:
        del found[at]
    elif kind == 2:
        found.insert(rng.randrange(len(found) + 1), found[at])
    elif kind == 3:
        other = rng.randrange(len(found))
        found[at], found[other] = found[other], found[at]
    elif kind == 4:
        found.insert(at, (WAIT, b""))
    else:
        found[at] = (found[at][0], by(found[at][1], max(1, len(found[at][1])) + 64))
    return b"".join(action(kind, content) for kind, content in found)[:most]


def _frame(request: types.Request) -> bytes:
    return action(FRAME, msgspec.msgpack.encode(request))


def seeds() -> Iterator[tuple[str, bytes]]:
    hello = _frame(rq.Hello(id=1, version=types.VERSION, client="fuzz", want_memory=True)) + action(WAIT)
    log = _frame(rq.LogStart(id=2, strategy="exact")) + action(WAIT) + _frame(rq.Sync(id=3)) + action(WAIT)
    take = action(TAKE, struct.pack("<3I", 0, 0, 64)) + action(PACKET, REQUEST.pack(OP_TAKE, 7, 0, 64, 1, 2))
    back = _frame(rq.GiveBack(id=4, region=0, first=0, words=bytes(8)))
    yield "log", hello + log + take + back + _frame(rq.LogCounters(id=5)) + _frame(rq.LogStop(id=6))
    begin = _frame(rq.MigrationBegin(id=7, migration=ID, destination="tcp://b:1"))
    pause = _frame(rq.Pause(id=8)) + _frame(rq.Save(id=9))
    prepare = _frame(rq.Prepare(id=10, migration=ID, destination="tcp://b:1", peer="b"))
    end = (
        _frame(rq.MigrationEnd(id=11, status="failed", error="x")) + _frame(rq.Resume(id=12)) + _frame(rq.Leave(id=13))
    )
    yield "migration", hello + log + begin + prepare + pause + action(WAIT) + end
    commit = _frame(rq.Commit(id=14, migration=ID)) + action(WAIT)
    for outcome in ("running", "discarded"):
        release = _frame(rq.Release(id=15, migration=ID, outcome=outcome))  # type: ignore[arg-type]
        yield f"handover-{outcome}", hello + begin + prepare + pause + action(WAIT) + commit + release + action(WAIT)
    asked = [rq.Status(id=20), rq.OperatorPause(id=21), rq.OperatorResume(id=22), rq.Cancel(id=23)]
    yield "operator", hello + b"".join(_frame(r) for r in asked) + action(WAIT) + _frame(rq.Stop(id=24))
    consoles = [rq.ConsoleAttach(id=30), rq.ConsoleInput(id=31, data=b"ls\n"), rq.ConsoleDetach(id=32)]
    yield "console", hello + b"".join(_frame(r) for r in consoles) + _frame(rq.GuestAsk(id=33, what="verify"))
    vhost = [rq.VhostAttach(id=40), rq.VhostStopped(id=41, number=1), rq.VhostDetach(id=42)]
    yield "vhost", hello + action(WAIT).join(_frame(r) for r in vhost) + action(WAIT)
    yield "descriptors", action(DESCRIPTORS, b"\3" + msgspec.msgpack.encode(rq.Status(id=1)))
    yield "raw", action(RAW, b"\xff\xff\xff\xff" + bytes(16))


TARGET = Target(
    name="control",
    run=run,
    seeds=seeds,
    most=4 << 10,
    memory=16 << 20,
    mutate=mutate,
    words=tuple(
        {
            word
            for struct_ in types.Request.__subclasses__()
            for word in (*(f.encode() for f in struct_.__struct_fields__), str(struct_.__struct_config__.tag).encode())
        }
    ),
)
