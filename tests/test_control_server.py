"""The control socket against clients that are hostile, clumsy, gone, or many."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from amig import bitmap
from amig.control import messages as m
from amig.control import replies as rp
from amig.control import requests as rq
from amig.control import types
from amig.control.client import SocketGuest
from amig.control.fdpass import close_all
from amig.control.link import Link
from amig.control.operator import ControlClient
from amig.control.server import MAX_CONNECTIONS
from amig.control.take import OP_TAKE, REPLY, REQUEST, Status
from amig.errors import ControlError, HostError, NoSuchGuest, UsageError
from amig.guest import Handover, RunState
from amig.host.hosted import HostedGuest
from amig.host.memory import MappedMemory
from amig.host.relay import ConsoleRelay

from .fakes import FakeMachine, hosted_guest, serving, until

ID = "0123456789abcdef" * 2
HELLO = {"type": "hello", "id": 1, "version": 1}


class Host:
    def __init__(self, hosted: HostedGuest, path: Path, console: ConsoleRelay) -> None:
        self.hosted = hosted
        self.machine: FakeMachine = hosted.machine  # type: ignore[assignment]
        self.path = path
        self.console = console

    async def guest(self, **options: float) -> SocketGuest:
        return await SocketGuest.connect(self.path, map_memory=MappedMemory.from_fds, **options)  # type: ignore[arg-type]

    async def client(self) -> ControlClient:
        return await ControlClient.connect(self.path)

    async def works(self) -> None:
        """The host still serves, and its guest runs untouched."""
        async with await self.client() as client:
            status = await client.status()
        assert status.state is RunState.RUNNING
        assert self.machine.running
        assert not self.machine.logging


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    path = tmp_path / "s"
    async with hosted_guest(tmp_path) as hosted:
        console = ConsoleRelay(hosted)
        async with serving(hosted, path, console):
            yield Host(hosted, path, console)


class Raw:
    """A client that says what it likes."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.setblocking(False)
        self.sock.connect(os.fspath(path))

    def say(self, message: object) -> None:
        payload = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        self.sock.send(struct.pack("<I", len(payload)) + payload)

    async def hear(self) -> m.AnyFromHost:
        loop = asyncio.get_running_loop()
        data, wanted = b"", 4
        while len(data) < wanted:
            async with asyncio.timeout(30):
                part = await loop.sock_recv(self.sock, wanted - len(data))
            if not part:
                raise EOFError
            data += part
            if len(data) == 4:
                wanted += struct.unpack("<I", data)[0]
        return m.decode_from_host(data[4:])

    async def closed(self) -> bool:
        """Whether the host hangs up, whatever it says before."""
        try:
            while True:
                await self.hear()
        except (EOFError, ConnectionResetError):
            return True

    def close(self) -> None:
        self.sock.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- the socket ------------------------------------------------------------------------------------------------------


async def test_the_socket_is_the_users_own(host: Host) -> None:
    assert stat.S_IMODE(host.path.stat().st_mode) == 0o600


async def test_a_path_too_long_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most 107"):
        await Link.connect(tmp_path / ("x" * 120))


async def test_a_taken_path_is_explained(host: Host) -> None:
    with pytest.raises(HostError, match="in use"):
        async with serving(host.hosted, host.path):
            pass


async def test_nobody_listens_there(tmp_path: Path) -> None:
    with pytest.raises(NoSuchGuest):
        await Link.connect(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_another_user_is_refused(host: Host) -> None:
    host.path.chmod(0o666)
    for parent in host.path.parents:  # up to the first that others may enter: it is the socket itself that refuses
        if parent.stat().st_mode & 0o005 == 0o005:
            break
        parent.chmod(0o755)
    script = (
        "import os, socket, sys\nos.setuid(12345)\ns = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1])\n"
        "try: print(repr(s.recv(1)))\nexcept ConnectionError: print(repr(b''))"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, os.fspath(host.path), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await child.communicate()
    assert out.strip() == b"b''"
    await host.works()


# --- hostile bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        struct.pack("<I", types.MAX_FRAME + 1),
        b"\xff\xff\xff\xff",
        struct.pack("<I", 0),
        struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1",
        struct.pack("<I", 3) + b"abc",
        os.urandom(5000),
    ],
    ids=["too large", "far too large", "empty", "no msgpack", "no map", "noise"],
)
async def test_bytes_that_are_no_frames_end_the_connection_only(host: Host, said: bytes) -> None:
    raw = Raw(host.path)
    raw.sock.send(said + bytes(70_000))
    assert await raw.closed()
    raw.close()
    await host.works()


@pytest.mark.parametrize(
    "message",
    [
        {"type": "explode", "id": 2},
        {"type": "sync", "id": "two"},
        {"type": "sync", "id": 2, "extra": 0},
        {"type": "ok", "id": 2},
        ["sync"],
    ],
    ids=repr,
)
async def test_messages_that_are_none_are_named_and_end_the_connection(host: Host, message: object) -> None:
    raw = Raw(host.path)
    raw.say(HELLO)
    assert isinstance(await raw.hear(), rp.HelloOk)
    raw.say(message)
    answer = await raw.hear()
    assert isinstance(answer, rp.Error)
    assert answer.code == "malformed"
    assert await raw.closed()
    raw.close()
    await host.works()


async def test_descriptors_that_nobody_asked_for_are_closed(host: Host) -> None:
    raw = Raw(host.path)
    with socket.socket() as surprise:
        before = open_files()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("8i", *[surprise.fileno()] * 8))]
        payload = msgspec.msgpack.encode(HELLO)
        raw.sock.sendmsg([struct.pack("<I", len(payload)) + payload], ancillary)
        assert await raw.closed()
        raw.close()
        await until(lambda: open_files() <= before, "the host closing what it was sent")
    await host.works()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "status", "id": 2}, "hello-first"),
        (HELLO | {"version": 2}, "version"),
        (HELLO | {"require": ["telepathy"]}, "unsupported-feature"),
    ],
)
async def test_the_handshake_is_strict(host: Host, message: object, code: str) -> None:
    raw = Raw(host.path)
    raw.say(message)
    answer = await raw.hear()
    assert isinstance(answer, rp.Error)
    assert answer.code == code
    raw.close()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "sync"}, "not-a-user"),
        ({"type": "give-back", "region": 0, "first": 0, "words": bytes(8)}, "not-a-user"),
        ({"type": "save"}, "wrong-state"),
        ({"type": "commit", "migration": ID}, "wrong-state"),
        ({"type": "release", "migration": ID, "outcome": "running"}, "wrong-state"),
        ({"type": "log-start", "strategy": "no-such"}, "unsupported"),
        ({"type": "cancel"}, "no-migration"),
    ],
    ids=repr,
)
async def test_what_is_out_of_turn_is_refused_and_the_connection_lives(
    host: Host, message: dict[str, object], code: str
) -> None:
    raw = Raw(host.path)
    raw.say(HELLO)
    await raw.hear()
    raw.say({"id": 5} | message)
    answer = await raw.hear()
    assert isinstance(answer, rp.Error)
    assert (answer.id, answer.code) == (5, code)
    raw.say({"type": "status", "id": 6})
    assert isinstance(await raw.hear(), rp.StatusIs)
    raw.close()
    await host.works()


@pytest.mark.parametrize(
    ("region", "first", "words"),
    [(0, 0, b""), (0, 0, b"1234567"), (9, 0, bytes(8)), (0, 2**62, bytes(8)), (0, 1, bytes(8))],
)
async def test_bits_of_nowhere_can_not_be_given_back(host: Host, region: int, first: int, words: bytes) -> None:
    link = await Link.connect(host.path)
    await link.hello(client="t")
    _, fds = await link.request(rq.LogStart(), rp.LogIsOn)
    close_all(fds)
    with pytest.raises(ControlError):
        await link.ask(rq.GiveBack(region=region, first=first, words=words))
    await link.ask(rq.Sync())
    link.close()
    await until(lambda: not host.machine.logging)


async def test_requests_sent_ahead_are_answered_in_order(host: Host) -> None:
    raw = Raw(host.path)
    raw.say(HELLO)
    for i in range(2, 200):
        raw.say({"type": "status" if i % 2 else "operator-resume", "id": i})
    heard = [await raw.hear() for _ in range(199)]
    assert [answer.id for answer in heard if isinstance(answer, types.Reply)] == list(range(1, 200))
    raw.close()


async def test_a_client_that_never_reads_does_not_fill_the_host(host: Host) -> None:
    raw = Raw(host.path)
    raw.say(HELLO)
    payload = msgspec.msgpack.encode(HELLO)
    frame = struct.pack("<I", len(payload)) + payload
    sent = stuck = 0
    while sent < 2 << 20 and stuck < 300:
        try:
            sent += raw.sock.send(frame * 100)
            stuck = 0
        except BlockingIOError:
            stuck += 1
        await asyncio.sleep(0)
    assert stuck == 300, "the host took requests whose answers nobody reads"
    await host.works()
    raw.close()


async def test_what_was_said_before_the_end_still_arrives(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with hosted_guest(tmp_path) as hosted:
        console = ConsoleRelay(hosted)
        async with AsyncExitStack() as server:
            await server.enter_async_context(serving(hosted, path, console))
            raw = Raw(path)
            raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.say(HELLO)
            raw.say({"type": "console-attach", "id": 2})
            await until(lambda: console.attached == 1)
            for _ in range(15):
                console.write(bytes(16 << 10))
            await asyncio.sleep(0)
            closing = asyncio.create_task(server.aclose())
            for _ in range(50):  # the host is as far as it gets before we read
                await asyncio.sleep(0)
            heard = 0
            try:
                while True:
                    message = await raw.hear()
                    heard += len(message.data) if isinstance(message, rp.ConsoleOutput) else 0
            except EOFError:
                pass
            assert heard == 15 * (16 << 10)
            await closing
            raw.close()


async def test_connections_are_limited_and_come_back(host: Host) -> None:
    raws = [Raw(host.path) for _ in range(MAX_CONNECTIONS)]
    for raw in raws:
        raw.say(HELLO)
        await raw.hear()
    surplus = Raw(host.path)
    assert await surplus.closed()
    surplus.close()
    for raw in raws:
        raw.close()

    async def again() -> bool:
        try:
            await host.works()
        except ControlError:
            return False
        return True

    async with asyncio.timeout(30):
        while not await again():
            await asyncio.sleep(0.01)


# --- the take socket -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packet", "status"),
    [
        (b"short", Status.BAD_REQUEST),
        (bytes(REQUEST.size + 1), Status.BAD_REQUEST),
        (REQUEST.pack(99, 0, 0, 64, 1, 7), Status.BAD_REQUEST),
        (REQUEST.pack(OP_TAKE, 99, 0, 64, 1, 7), Status.BAD_REQUEST),
        (REQUEST.pack(OP_TAKE, 0, 2**63, 64, 1, 7), Status.BAD_REQUEST),
        (REQUEST.pack(OP_TAKE, 0, 0, 2**64 - 64, 1, 7), Status.BAD_REQUEST),
        (REQUEST.pack(OP_TAKE, 0, 32, 64, 1, 7), Status.BAD_REQUEST),
        (REQUEST.pack(OP_TAKE, 0, 0, 64, 2, 7), Status.STALE_GENERATION),
    ],
)
async def test_packets_that_are_no_takes_are_refused_one_by_one(host: Host, packet: bytes, status: Status) -> None:
    link = await Link.connect(host.path)
    await link.hello(client="t")
    _, fds = await link.request(rq.LogStart(), rp.LogIsOn)
    await link.ask(rq.Sync())
    with socket.socket(fileno=fds.pop()) as take:
        take.setblocking(False)
        loop = asyncio.get_running_loop()
        for said, expected in ((packet, status), (REQUEST.pack(OP_TAKE, 0, 0, 64, 1, 8), Status.OK)):
            take.send(said)
            async with asyncio.timeout(30):
                answer = await loop.sock_recv(take, 4096)
            _, found, zero, pages = REPLY.unpack_from(answer)
            assert (found, zero) == (expected, 0)
            assert pages == (64 if expected is Status.OK else 0)
            assert (len(answer) > REPLY.size) is (expected is not Status.OK)
    close_all(fds)
    link.close()


async def test_a_sync_on_the_take_socket_does_not_wait_for_the_control_socket(host: Host) -> None:
    guest = await host.guest()
    await guest.log_start(None)
    taken = {region.id: await guest.take_and_clear(region.id, 0, region.pages) for region in guest.info.memory.regions}
    assert all(words.any() for words in taken.values())
    host.machine.before_pause.clear()
    async with await host.client() as other:
        pausing = asyncio.create_task(other.pause())  # keeps the thread busy that serves the control socket
        host.machine.write(0, 5, 1)
        pending = await guest.sync()
        assert bitmap.to_pages(pending[0]).tolist() == [5]
        assert "pause" not in host.machine.calls
        host.machine.before_pause.set()
        await pausing
    await guest.close()


async def test_shared_bitmaps_can_not_be_written_by_the_client(host: Host) -> None:
    link = await Link.connect(host.path)
    await link.hello(client="t")
    _, fds = await link.request(rq.LogStart(), rp.LogIsOn)
    for path_flags in (os.O_RDWR, os.O_WRONLY):
        with pytest.raises(OSError):
            again = os.open(f"/proc/self/fd/{fds[0]}", path_flags)
            try:
                os.write(again, b"x")
            finally:
                os.close(again)
    with pytest.raises(OSError):
        os.ftruncate(fds[0], 0)
    close_all(fds)
    link.close()


async def test_the_guests_memory_is_passed_read_only(host: Host) -> None:
    link = await Link.connect(host.path)
    hello, fds = await link.hello(client="t", want_memory=True)
    assert hello.descriptors == len(fds) == 2
    for fd in fds:
        with pytest.raises(OSError):
            os.write(fd, b"x")
        with pytest.raises(OSError):
            os.ftruncate(fd, 0)
    close_all(fds)
    link.close()


# --- going away ------------------------------------------------------------------------------------------------------


MIGRATOR = """
import asyncio, sys
from amig.control.client import SocketGuest
from amig.guest import Handover
from amig.host.memory import MappedMemory

async def main(path, stage):
    guest = await SocketGuest.connect(path, map_memory=MappedMemory.from_fds, client="doomed")
    await guest.migration_begin("0123456789abcdef" * 2, "tcp://far:7000")
    if stage > 0:
        await guest.log_start(None)
        await guest.sync()
        await guest.take_and_clear(0, 0, 64)
    if stage > 1:
        await guest.pause()
    if stage > 2:
        await guest.save()
        await guest.prepare(Handover(migration="0123456789abcdef" * 2, destination="tcp://far:7000", peer="far/w"))
    if stage > 3:
        await guest.commit("0123456789abcdef" * 2)
    print("here", flush=True)
    await asyncio.sleep(600)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.mark.parametrize("stage", range(5), ids=["begun", "logging", "paused", "prepared", "committed"])
async def test_a_killed_migrator_leaves_the_guest_as_it_was(host: Host, stage: int) -> None:
    before = open_files()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MIGRATOR, os.fspath(host.path), str(stage), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        async with asyncio.timeout(60):
            assert await child.stdout.readline() == b"here\n"
        assert host.machine.logging is (stage > 0)
        assert host.machine.running is (stage < 2)
        assert host.hosted.migration is not None
    finally:
        child.send_signal(signal.SIGKILL)
        await child.wait()
    await until(lambda: not host.machine.logging, "logging going off")
    if stage == 4:
        await until(lambda: host.hosted.state is RunState.COMMITTED)
        assert not host.machine.running
        assert host.hosted.in_doubt is not None
        assert host.hosted.in_doubt.migration == ID
        return
    await until(lambda: host.machine.running and host.hosted.migration is None, "the guest running again")
    await until(lambda: host.hosted.records.source("web1") is None, "its record, which comes after the guest")
    assert host.hosted.last_migration is not None
    assert host.hosted.last_migration.status == "failed"
    await host.works()
    child._transport.close()  # type: ignore[attr-defined]
    await until(lambda: open_files() <= before, "descriptors being given back")


async def test_a_host_that_goes_is_told_to_every_caller(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with hosted_guest(tmp_path) as hosted:
        async with serving(hosted, path):
            guest = await SocketGuest.connect(path, map_memory=MappedMemory.from_fds)
            await guest.log_start(None)
            await guest.sync()
            client = await ControlClient.connect(path)
        await client.gone()
        for call in (guest.sync, guest.pause, lambda: guest.take_and_clear(0, 0, 64), client.status):
            with pytest.raises(ControlError, match="host has gone") as caught:
                await call()
            assert caught.value.code == "closed"
        await guest.close()
        assert not hosted.machine.logging  # type: ignore[attr-defined]


async def test_a_guest_that_ends_is_told_with_its_reason(host: Host) -> None:
    link = await Link.connect(host.path)
    await link.hello(client="t")
    notices: list[types.Notice] = []
    link.on_notice = notices.append
    host.machine.crash()
    await until(lambda: bool(notices))
    assert notices == [rp.GuestEnded(state=RunState.FAILED, reason="triple fault")]
    link.close()


async def test_a_host_that_does_not_answer_breaks_the_link(host: Host) -> None:
    guest = await host.guest(timeout=0.2)
    host.machine.before_pause.clear()
    try:
        with pytest.raises(ControlError, match=r"no answer to Pause") as caught:
            await guest.pause()
        assert caught.value.code == "timeout"
    finally:
        host.machine.before_pause.set()
    await until(lambda: host.machine.calls[-1] == "resume", "the pause being undone")
    await guest.close()


async def test_a_take_that_is_not_answered_breaks_the_take_socket(host: Host) -> None:
    guest = await host.guest(timeout=0.2)
    await guest.log_start(None)
    await guest.sync()
    with host.machine.log.atomically(), pytest.raises(ControlError, match="no answer to a take"):
        await guest.take_and_clear(0, 0, 64)
    await guest.close()
    await host.works()


# --- many at once ----------------------------------------------------------------------------------------------------


async def test_status_tells_all_there_is(host: Host) -> None:
    migration, meter = await host.guest(), await host.guest()
    await migration.migration_begin(ID, "tcp://far:7000")
    await migration.log_start("slot-cache")
    await meter.log_start(None)
    migration.migration_progress(types.Progress(state="memory", round=2, fraction=0.5))
    await migration.pause()
    async with await host.client() as client:
        assert client.hello.name == "web1"
        status = await client.status()
    assert status.name == "web1"
    assert status.engine == "fake"
    assert status.pid == os.getpid()
    assert status.state is RunState.PAUSED
    assert not status.operator_paused
    assert status.vcpus == 2
    assert status.memory_bytes == 264 * 4096
    assert status.log_strategy == "slot-cache"
    assert len(status.log_users) == 2
    assert status.migration is not None
    assert status.migration.destination == "tcp://far:7000"
    assert (status.migration.progress.round, status.migration.progress.state) == (2, "memory")
    await migration.migration_end("cancelled", "by hand")
    async with await host.client() as client:
        status = await client.status()
    assert status.migration is None
    assert status.last_migration is not None
    assert (status.last_migration.status, status.last_migration.error) == ("cancelled", "by hand")
    await migration.close()
    await meter.close()


async def test_commands(host: Host) -> None:
    async with await host.client() as client:
        await client.pause()
        assert not host.machine.running
        assert (await client.status()).operator_paused
        await client.resume()
        assert host.machine.running
        with pytest.raises(ControlError) as caught:
            await client.cancel()
        assert caught.value.code == "no-migration"
        guest = await host.guest()
        await guest.migration_begin(ID, "tcp://far:7000")
        await client.cancel()
        async with asyncio.timeout(30):
            await guest.cancel_requested.wait()
        await guest.close()
        await client.stop()
        assert host.hosted.state is RunState.STOPPED


async def test_a_handover_in_doubt_is_not_stopped_by_accident(host: Host) -> None:
    guest = await host.guest()
    await guest.pause()
    await guest.prepare(Handover(migration=ID, destination="tcp://far:7000", peer="far/w"))
    await guest.commit(ID)
    async with await host.client() as client:
        with pytest.raises(ControlError) as caught:
            await client.stop()
        assert caught.value.code == "in-doubt"
        status = await client.status()
        assert status.in_doubt is not None
        assert status.in_doubt.migration == ID
        await client.stop(force=True)
    assert host.hosted.state is RunState.STOPPED
    await guest.close()


async def test_consoles_see_the_guest_and_it_sees_them(host: Host) -> None:
    host.console.write(b"booting\n")
    async with await host.client() as one, await host.client() as two:
        first = await one.console()
        assert await first.read() == b"booting\n"
        second = await two.console(replay=False)
        host.console.write(b"login: ")
        assert await first.read() == b"login: "
        assert await second.read() == b"login: "
        await first.write(b"root\r" + bytes(20_000))
        assert host.machine.input == b"root\r" + bytes(20_000)
        assert (await one.status()).consoles == 2
    await until(lambda: host.console.attached == 0)


async def test_a_console_that_nobody_reads_loses_output_and_is_told(host: Host) -> None:
    async with await host.client() as client:
        console = await client.console()
        chunk = bytes(range(256)) * 256
        total = 0
        # the reader's own buffer fills, then the socket's, then the host's share for this client
        while total < 16 << 20:
            host.console.write(chunk)
            total += len(chunk)
            await asyncio.sleep(0)
        got = 0
        async with asyncio.timeout(60):
            while (part := await console.read()) != b"!":
                got += len(part)
                host.console.write(b"!")
                total += 1
        got += 1
        assert console.dropped > 0
        assert got + console.dropped == total
        await host.works()


async def test_the_relay_survives_a_sink_that_fails(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    seen = bytearray()
    relay = ConsoleRelay(host.hosted, (full, seen.extend))
    relay.write(b"one")
    relay.write(b"two")
    assert seen == b"onetwo"
    assert caplog.text.count("gets no more") == 1


async def test_what_the_log_has_cost_can_be_asked(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with hosted_guest(tmp_path) as hosted, serving(hosted, path):
        guest = await SocketGuest.connect(path, map_memory=MappedMemory.from_fds)
        try:
            assert (await guest.log_counters()).strategy == ""
            started = await guest.log_start("slot-cache")
            await guest.sync()
            region = guest.info.memory.regions[0]
            await guest.take_and_clear(region.id, 0, region.pages)
            counters = await guest.log_counters()
            assert counters.strategy == started.strategy == "slot-cache"
            assert (counters.syncs, counters.takes, counters.pages_taken) == (1, 1, region.pages)
            assert counters.gets >= len(guest.info.memory.slots)
            assert counters.clears > 0
        finally:
            await guest.close()
