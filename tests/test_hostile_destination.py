"""A destination that says what it likes: the guest stays where it is, runs, and its dirty log is off."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from amig.errors import AmigError, InDoubt, LinkLost, MigrationError, PeerError, Refused
from amig.guest import RunState
from amig.policy import Policy
from amig.session.migration import Migration
from amig.transport import Connection, listen
from amig.transport.framed import FramedConnection
from amig.wire import limits, messages
from amig.wire.frames import HEADER_SIZE
from amig.wire.frametype import FrameType
from amig.wire.messages import Abort, Discarded, Hello, Message, Ping, Placed, Prepared, Refuse, Running, Welcome
from tests.fuzz import streams
from tests.modelguest import ModelGuest

PAGES = 3000
OTHER = "f" * 32
QUICK = Policy(connect_timeout=0.5, handover_timeout=0.5)


class Liar:
    """The destination's end of the first connection, with nothing that checks what it sends."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.link = FramedConnection(connection)
        self.hello: Hello | None = None

    @property
    def migration(self) -> str:
        assert self.hello is not None
        return self.hello.migration

    async def say(self, *said: Message) -> None:
        for message in said:
            await self.link.send_message(message)

    def welcome(self, **changes: object) -> Welcome:
        assert self.hello is not None
        fields = {"migration": self.migration, "name": "web1", "identity": "liar", "token": bytes(32)}
        fields["features"] = self.hello.features_required
        return Welcome(**(fields | changes))  # type: ignore[arg-type]

    async def greet(self) -> None:
        """Read HELLO."""
        hello = await self.link.receive()
        assert isinstance(hello, Hello)
        self.hello = hello

    async def take(self, until: FrameType) -> None:
        """Take everything, as a good destination does, up to a frame of that kind."""
        assert self.hello is not None
        while True:
            header = await self.link.read_header()
            if header.type is FrameType.BLOCK:
                block = await self.link.read_block(header, self.hello.memory)
                if block.header.data_bytes:
                    await self.link.skip_data()
            elif header.type is FrameType.STATE:
                await self.link.read_payload(header)
            else:
                message = await self.link.read_message(header)
                if isinstance(message, messages.Round):
                    await self.say(Placed(round=message.round))
                elif isinstance(message, Ping):
                    await self.say(messages.Pong(seq=message.seq, sent_ns=message.sent_ns))
            if header.type is until:
                return

    async def listen(self) -> None:
        """Say no more, and read until the source hangs up."""
        waste = bytearray(1 << 16)
        with contextlib.suppress(LinkLost):
            while True:
                await self.connection.recv_into(waste)


Act = Callable[[Liar], Awaitable[None]]


@asynccontextmanager
async def destination(act: Act) -> AsyncIterator[str]:
    """Somebody who listens, does ``act``, and hangs up once the source has. Yields the address."""
    listener = await listen("tcp://127.0.0.1:0")
    over = asyncio.Event()

    async def serve() -> None:
        while True:
            connection = await listener.accept()
            liar = Liar(connection)
            try:
                await liar.greet()
                await act(liar)
                await over.wait()
            except (AmigError, AssertionError):
                pass
            finally:
                connection.abort()

    serving = asyncio.create_task(serve())
    try:
        yield listener.address
    finally:
        over.set()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await listener.close()


def busy_guest() -> ModelGuest:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(0, PAGES, 2))
    return guest


def assert_stayed(guest: ModelGuest) -> None:
    assert guest.state is RunState.RUNNING
    assert guest.hub.strategy is None, "the dirty log was left on"
    assert "commit" not in guest.calls


async def fails(act: Act, policy: Policy = QUICK) -> AmigError:
    """Try to move a guest there; returns why it stayed."""
    guest = busy_guest()
    async with destination(act) as address:
        with pytest.raises(AmigError) as caught:
            async with asyncio.timeout(60), Migration(guest, address, policy):
                pass
    assert_stayed(guest)
    return caught.value


# --- the handshake ---------------------------------------------------------------------------------------------------


async def test_one_that_never_answers_costs_the_time_limit() -> None:
    async def act(liar: Liar) -> None:
        await liar.listen()

    assert "did not answer within 0.5 s" in str(await fails(act))


async def test_one_that_talks_without_end_before_it_answers_costs_the_time_limit() -> None:
    async def act(liar: Liar) -> None:
        while True:
            await liar.say(*[Ping(seq=1, sent_ns=1)] * 50)

    assert "did not answer within 0.5 s" in str(await fails(act))


async def test_a_welcome_without_end_is_refused_at_its_header() -> None:
    async def act(liar: Liar) -> None:
        header = struct.pack("<IBBHQ", limits.MAX_CONTROL + 1, FrameType.WELCOME, 0, 0, 0)
        await liar.connection.send(header)
        while True:
            await liar.connection.send(bytes(1 << 16))

    tracemalloc.start()
    try:
        error = await fails(act)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(error, PeerError)
    assert peak < 64 << 20


async def test_a_header_alone_keeps_nobody_waiting() -> None:
    async def act(liar: Liar) -> None:
        await liar.connection.send(streams.message(liar.welcome())[: HEADER_SIZE + 3])
        await liar.listen()

    assert "did not answer within 0.5 s" in str(await fails(act))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"migration": OTHER}, "another migration"),
        ({"streams": 2}, "wants 2 connections; 1 were offered"),
    ],
)
async def test_a_welcome_to_something_else_is_refused(changes: dict[str, object], why: str) -> None:
    async def act(liar: Liar) -> None:
        await liar.say(liar.welcome(**changes))
        await liar.listen()

    error = await fails(act)
    assert isinstance(error, PeerError)
    assert why in str(error)


@pytest.mark.parametrize("kind", ["placed", "prepared", "running", "discarded", "hello"])
async def test_anything_else_than_an_answer_to_hello_is_refused(kind: str) -> None:
    async def act(liar: Liar) -> None:
        said = {
            "placed": Placed(round=0),
            "prepared": Prepared(migration=liar.migration),
            "running": Running(migration=liar.migration),
            "discarded": Discarded(migration=liar.migration, reason="no"),
            "hello": liar.hello,
        }
        message = said[kind]
        assert message is not None
        await liar.say(message)
        await liar.listen()

    assert "in state hello-sent" in str(await fails(act))


async def test_a_refusal_is_shown_without_what_would_disturb_a_terminal() -> None:
    async def act(liar: Liar) -> None:
        await liar.say(Refuse(code="no", reason="\x1b[2Jno\nroom" + "x" * 1000))
        await liar.listen()

    error = await fails(act)
    assert isinstance(error, Refused)
    assert "\x1b" not in str(error)
    assert "\n" not in str(error)


# --- while memory is sent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("round_", [1, limits.MAX_ROUND])
async def test_a_round_that_was_not_sent_is_not_believed_to_be_placed(round_: int, early: bool) -> None:
    async def act(liar: Liar) -> None:
        await liar.say(liar.welcome())
        await liar.take(FrameType.PING if early else FrameType.BLOCK)
        await liar.say(Placed(round=round_))
        await liar.take(FrameType.END)

    error = await fails(act, Policy(bandwidth=2e6, handover_timeout=1))
    assert isinstance(error, PeerError)
    assert f"round {round_}" in str(error)


@pytest.mark.parametrize("kind", ["welcome", "prepared", "running", "discarded", "refuse", "query", "block"])
async def test_frames_out_of_place_end_it(kind: str) -> None:
    async def act(liar: Liar) -> None:
        await liar.say(liar.welcome())
        said = {
            "welcome": streams.message(liar.welcome()),
            "prepared": streams.message(Prepared(migration=liar.migration)),
            "running": streams.message(Running(migration=liar.migration)),
            "discarded": streams.message(Discarded(migration=liar.migration, reason="no")),
            "refuse": streams.message(Refuse(code="no", reason="no")),
            "query": streams.message(messages.Query(migration=liar.migration)),
            "block": struct.pack("<IBBHQ", 4096, FrameType.BLOCK, 0, 0, 0),
        }
        while True:
            await liar.connection.send(said[kind])

    error = await fails(act, Policy(bandwidth=2e6))
    assert isinstance(error, PeerError), error


async def test_one_that_begins_to_give_up_and_does_not_say_why_is_no_bug_of_ours() -> None:
    async def act(liar: Liar) -> None:
        await liar.say(liar.welcome())
        await liar.connection.send(streams.message(Abort(code="failed", reason="because"))[:HEADER_SIZE])
        await liar.take(FrameType.END)

    assert isinstance(await fails(act), LinkLost | MigrationError)


async def test_pings_without_end_do_not_fill_the_source() -> None:
    """Each is answered, so whoever does not read the answers is not read any more."""
    blocked = asyncio.Event()

    async def act(liar: Liar) -> None:
        await liar.say(liar.welcome())
        ping = streams.message(Ping(seq=1, sent_ns=1)) * 500
        try:
            while True:
                async with asyncio.timeout(1):
                    await liar.connection.send(ping)
        except TimeoutError:
            blocked.set()
        await asyncio.get_running_loop().create_future()

    guest = busy_guest()
    async with destination(act) as address:
        async with Migration(guest, address, Policy(bandwidth=2e6)) as migration:
            async with asyncio.timeout(60):
                await blocked.wait()
            migration.cancel()
    assert_stayed(guest)
    assert (await migration.result()).status == "cancelled"


async def test_one_that_stops_reading_can_be_left() -> None:
    stopped = asyncio.Event()

    async def act(liar: Liar) -> None:
        await liar.say(liar.welcome())
        stopped.set()
        await asyncio.get_running_loop().create_future()

    guest = busy_guest()
    async with destination(act) as address, asyncio.timeout(60):
        async with Migration(guest, address) as migration:
            await stopped.wait()
            migration.cancel()
    assert_stayed(guest)


# --- while the guest is paused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trickle", [False, True], ids=["stops", "trickles"])
async def test_a_paused_guest_does_not_wait_for_one_that_stops_reading(trickle: bool) -> None:
    guest = busy_guest()
    guest.on_save = lambda: guest.write(np.arange(PAGES))  # more than sockets hold

    async def act(liar: Liar) -> None:
        await liar.say(liar.welcome())
        taking = asyncio.create_task(liar.take(FrameType.END))
        while "save" not in guest.calls:
            await asyncio.sleep(0.001)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        while trickle:
            with contextlib.suppress(AmigError):
                await liar.connection.recv_into(bytearray(1000))
            await asyncio.sleep(0.01)
        await asyncio.get_running_loop().create_future()

    async with destination(act) as address:
        with pytest.raises(LinkLost, match="runs on here"):
            async with asyncio.timeout(60), Migration(guest, address, QUICK):
                pass
    assert guest.calls.count("pause") == 1
    assert_stayed(guest)


async def test_a_paused_guest_does_not_wait_for_one_that_is_never_prepared() -> None:
    async def act(liar: Liar) -> None:
        await liar.say(liar.welcome())
        await liar.take(FrameType.END)
        while True:
            await liar.say(Ping(seq=1, sent_ns=1))
            await liar.link.receive()

    assert "was not ready" in str(await fails(act))


async def test_being_prepared_for_another_migration_is_refused() -> None:
    async def act(liar: Liar) -> None:
        await liar.say(liar.welcome())
        await liar.take(FrameType.END)
        await liar.say(Prepared(migration=OTHER))
        await liar.listen()

    error = await fails(act)
    assert isinstance(error, PeerError)
    assert "another migration" in str(error)


async def test_one_that_is_prepared_and_discards_it_at_once_leaves_the_guest_here() -> None:
    async def act(liar: Liar) -> None:
        await liar.say(liar.welcome())
        await liar.take(FrameType.END)
        await liar.say(Prepared(migration=liar.migration), Discarded(migration=liar.migration, reason="no"))
        await liar.listen()

    guest = busy_guest()
    async with destination(act) as address:
        with pytest.raises(AmigError):
            async with asyncio.timeout(60), Migration(guest, address, QUICK):
                pass
    assert guest.state is RunState.RUNNING
    assert guest.hub.strategy is None


@pytest.mark.parametrize("kind", ["running", "discarded"])
async def test_an_answer_to_commit_for_another_migration_settles_nothing(kind: str) -> None:
    async def act(liar: Liar) -> None:
        await liar.say(liar.welcome())
        await liar.take(FrameType.END)
        await liar.say(Prepared(migration=liar.migration))
        await liar.take(FrameType.COMMIT)
        said = Running(migration=OTHER) if kind == "running" else Discarded(migration=OTHER, reason="no")
        await liar.say(said)
        await liar.listen()

    guest = busy_guest()
    async with destination(act) as address:
        with pytest.raises(InDoubt):
            async with asyncio.timeout(60), Migration(guest, address, QUICK):
                pass
    assert guest.state is RunState.COMMITTED, "it is let go of, or runs, by the word of somebody else"
