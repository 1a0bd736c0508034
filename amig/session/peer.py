"""Another amig as the destination: handshake, connections, and the source's half of the handover."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence

from amig.errors import AmigError, InDoubt, LinkLost, MigrationError, PeerError, Refused, Untrusted, VerifyFailed
from amig.guest import Outcome
from amig.policy import KEEPALIVE, STALL
from amig.session.agreement import Hearing
from amig.session.alive import keep_alive
from amig.session.asking import confirm, query
from amig.session.destination import OutOfPatience, Placed
from amig.session.streams import StreamSink
from amig.stages.resumption import Answer
from amig.stages.send import BlockSink
from amig.transport import Dialer
from amig.transport.framed import FramedConnection
from amig.wire.frametype import FrameType
from amig.wire.messages import (
    BUSY,
    RESUME_FEATURE,
    VERIFY_FAILED,
    Abort,
    Commit,
    Digests,
    Discarded,
    End,
    Held,
    Hello,
    Join,
    Joined,
    Message,
    Ping,
    Pong,
    Prepared,
    Refuse,
    Resume,
    Resumed,
    Running,
    Welcome,
)
from amig.wire.messages import (
    Placed as PlacedMessage,
)
from amig.wire.states import SourceProtocol, SourceState

_ABORT_TIMEOUT = 2.0
PINGS = 3
FIRST_PAUSE = 0.05
MAX_PAUSE = 2.0
"""Seconds between two questions after a lost answer."""


class _Busy(Refused):
    """Not now."""


class Peer:
    """`Destination` over sockets: one connection for control and memory, and more for memory."""

    one_way = False

    def __init__(
        self,
        dialer: Dialer,
        *,
        connect_timeout: float,
        handover_timeout: float,
        keepalive: float = KEEPALIVE,
        stall: float = STALL,
    ) -> None:
        """All in seconds; see `amig.policy.Policy`."""
        self.address = dialer.address
        self.parallel = dialer.parallel
        self.no_return = (
            "the receiver that was started there ends with this connection" if dialer.max_connections == 1 else ""
        )
        self._keepalive = keepalive
        self._stall = stall
        self._hello: Hello | None = None
        self._welcome: Welcome | None = None
        self._dialer = dialer
        self._connect_timeout = connect_timeout
        self._handover_timeout = handover_timeout
        self._links: list[FramedConnection] = []
        self._migration = ""
        self._protocol = SourceProtocol()
        self._placed: Placed = _nothing_sent
        self._gave_up = False
        """Whether the destination has said that it throws away what it has."""
        self._committed = False
        """Whether the guest has been given away: from then on only the destination's word ends this."""
        loop = asyncio.get_running_loop()
        self._prepared: asyncio.Future[Prepared] = loop.create_future()
        self._outcome: asyncio.Future[Outcome] = loop.create_future()
        self.release = ""
        """Release of amig at the destination, for people."""

    async def open(self, hello: Hello) -> str:
        """Connect, agree, and join the further connections.

        A destination that is busy is asked again for as long: it may just be tidying up after an attempt of our own
        that was cancelled.
        """
        until = time.monotonic() + self._connect_timeout
        pause = FIRST_PAUSE
        busy = ""
        while True:
            try:
                async with asyncio.timeout(max(until - time.monotonic(), 0)):
                    return await self._open(hello)
            except _Busy as error:
                busy = str(error)
            except TimeoutError:
                if not busy:
                    raise LinkLost(
                        f"{self.address} did not answer within {self._connect_timeout:g} s: is it `amig receive` that "
                        "listens there, and is it free? (--connect-timeout waits longer)"
                    ) from None
            if time.monotonic() + pause > until:
                raise Refused(busy)
            self._drop()
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)

    async def _open(self, hello: Hello) -> str:
        self._migration = hello.migration
        first = await self._connect(self._protocol)
        await first.send_message(hello)
        answer = await _answer(first)
        if isinstance(answer, Refuse):
            kind = _Busy if answer.code == BUSY else Refused
            raise kind(f"{self.address} refused: {answer.reason}")
        assert isinstance(answer, Welcome)  # noqa: S101 - the table of states lets nothing else through
        if answer.migration != hello.migration or not set(hello.features_required) <= set(answer.features):
            raise PeerError(f"{self.address} welcomed another migration, or without the features asked for")
        if answer.streams > hello.streams:
            raise PeerError(f"{self.address} wants {answer.streams} connections; {hello.streams} were offered")
        self.release = answer.amig
        self._hello, self._welcome = hello, answer
        if RESUME_FEATURE not in answer.features:
            self.no_return = self.no_return or "it does not keep what has come"
        await self._join(answer.streams, answer.token)
        return answer.identity

    async def _join(self, streams: int, token: bytes, joined_one: Callable[[], None] = lambda: None) -> None:
        for stream in range(1, streams):
            link = await self._connect(SourceProtocol())
            await link.send_message(Join(migration=self._migration, token=token, stream=stream))
            joined = await _answer(link)
            if isinstance(joined, Refuse):
                raise Refused(f"{self.address} refused connection {stream}: {joined.reason}")
            assert isinstance(joined, Joined)  # noqa: S101 - as above
            joined_one()

    async def _connect(self, protocol: SourceProtocol) -> FramedConnection:
        link = FramedConnection(await self._dialer.connect(timeout=self._connect_timeout), protocol)
        self._links.append(link)
        return link

    async def round_trip(self) -> float:
        """Return the best of a few pings, in seconds; comes before `listen`. Raises `LinkLost`."""
        best = self._connect_timeout
        try:
            async with asyncio.timeout(self._connect_timeout):
                for seq in range(PINGS):
                    began = time.monotonic_ns()
                    await self._links[0].send_message(Ping(seq=seq, sent_ns=began))
                    while not isinstance(message := await self._links[0].receive(), Pong):
                        await self._handle(message)
                    best = min(best, (time.monotonic_ns() - began) / 1e9)
        except TimeoutError:
            raise LinkLost(f"{self.address} did not answer a ping within {self._connect_timeout:g} s") from None
        return best

    def sinks(self, placed: Placed) -> Sequence[BlockSink]:
        """Return a sink for each connection."""
        self._placed = placed
        return [StreamSink(link, live=link.connection.pages is not None) for link in self._links]

    async def listen(self) -> None:
        """Handle what comes on the first connection, until cancelled or the handover has ended."""
        try:
            while self._protocol.state not in (SourceState.DONE, SourceState.RETURNED):
                await self._handle(await self._links[0].receive())
        except (LinkLost, PeerError) as error:
            self._protocol.lost()
            if not self._committed:
                raise
            # Not raised here: the handover waits for its outcome and must be told, not cancelled. This may be in the
            # middle of the answer, when the states say already that it came.
            if not self._outcome.done():
                self._outcome.set_exception(InDoubt(str(error)))

    async def keep_alive(self) -> None:
        """Watch the connections until END is sent: from then on the handover has its own time limit."""
        await keep_alive(self._links, every=self._keepalive, limit=self._stall, while_=self._sending)

    def _sending(self) -> bool:
        return self._protocol.state in (SourceState.MEMORY, SourceState.SWITCHOVER)

    async def resume(self, since: int, round_: int) -> Answer:
        """Drop all connections, connect anew, and agree on what the destination has; see `Destination.resume`."""
        self._drop()
        self._prepared = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._connect_timeout) as limit:
                return await self._resume(since, round_, limit)
        except TimeoutError:
            raise LinkLost(f"{self.address} did not answer within {self._connect_timeout:g} s") from None

    def _drop(self) -> None:
        """Drop all connections; the next one begins anew."""
        links, self._links = self._links, []
        for link in links:
            link.abort()
        self._protocol = SourceProtocol()

    async def _resume(self, since: int, round_: int, limit: asyncio.Timeout) -> Answer:
        def go_on() -> None:  # what a large guest's destination has may take long to say: the limit is on silence
            limit.reschedule(asyncio.get_running_loop().time() + self._connect_timeout)

        hello, welcome = self._hello, self._welcome
        assert hello is not None and welcome is not None  # noqa: S101, PT018 - open comes first
        first = await self._connect(self._protocol)
        await first.send_message(Resume(migration=self._migration, token=welcome.token, since=since, round=round_))
        hearing = Hearing(hello.memory)
        go_on()
        while isinstance(message := await first.receive(), Held):
            go_on()
            hearing.add(message)
        if isinstance(message, Refuse):
            raise Refused(f"{self.address} refused: {message.reason}")
        assert isinstance(message, Resumed)  # noqa: S101 - the table of states lets nothing else through
        if message.migration != self._migration:
            raise PeerError(f"{self.address} goes on with another migration")
        answer = hearing.answer(message.rounds)
        try:
            go_on()
            await self._join(welcome.streams, message.token, go_on)
        except Refused as error:  # it knows us, and has lost patience or a connection: there is a next time
            raise LinkLost(str(error)) from error
        return answer

    async def _handle(self, message: Message) -> None:
        match message:
            case PlacedMessage():
                self._placed(message.round)
            case Prepared() if message.migration != self._migration:
                raise PeerError(f"{self.address} is prepared for another migration")
            case Prepared():
                self._prepared.set_result(message)
            case Running() | Discarded() if message.migration != self._migration:
                # As in `listen`: the handover must be told.
                if not self._outcome.done():
                    self._outcome.set_exception(PeerError(f"{self.address} answered for another migration"))
            case Running():
                self._outcome.set_result(Outcome.RUNNING)
            case Discarded():
                if self._prepared.done() and not self._outcome.done():
                    self._outcome.set_result(Outcome.DISCARDED)
            case Abort():
                self._gave_up = True
                kind = VerifyFailed if message.code == VERIFY_FAILED else MigrationError
                raise kind(f"{self.address} gave up: {message.reason}")
            case Ping():
                await self._links[0].send_message(Pong(seq=message.seq, sent_ns=message.sent_ns))
            case _:
                pass

    async def finish(self, state: bytes, pages: Iterable[Digests], end: End) -> None:
        """Send state, digests and END; returns once the destination is PREPARED."""
        try:
            async with asyncio.timeout(self._handover_timeout):
                await self._links[0].send_state(state)
            for some in pages:  # takes as long as hashing all memory does
                async with asyncio.timeout(self._handover_timeout):
                    await self._links[0].send_message(some)
                await asyncio.sleep(0)
            async with asyncio.timeout(self._handover_timeout):
                await self._links[0].send_message(end)
                await asyncio.shield(self._prepared)
        except TimeoutError:
            raise OutOfPatience(
                f"{self.address} was not ready to run the guest within {self._handover_timeout:g} s "
                "(--handover-timeout waits longer)"
            ) from None

    async def commit(self, migration: str) -> Outcome:
        """Send COMMIT and wait for RUNNING or DISCARDED; ask on other connections when that is lost. Raises `InDoubt`.

        What the destination says first holds, on whatever connection.
        """
        self._committed = True
        if self._outcome.done() and self._outcome.exception() is None:
            return self._outcome.result()
        if not self._protocol.may_send(FrameType.COMMIT):
            return await self._ask(migration, "the connection was lost before it could be sent")
        try:
            async with asyncio.timeout(self._handover_timeout):
                await self._links[0].send_message(Commit(migration=migration))
                return await asyncio.shield(self._outcome)
        except (InDoubt, LinkLost, PeerError, TimeoutError) as error:
            why = str(error) or f"no answer within {self._handover_timeout:g} s"
        return await self._ask(migration, why)

    async def _ask(self, migration: str, why: str) -> Outcome:
        """Ask over fresh connections until there is an answer, for as long as one is waited for."""
        for link in self._links:
            link.abort()
        until = time.monotonic() + self._handover_timeout
        pause = FIRST_PAUSE
        while True:
            try:
                link, outcome = await query(self._dialer, migration, timeout=self._connect_timeout)
            except (AmigError, OSError) as error:
                if isinstance(error, Untrusted) or time.monotonic() + pause > until:
                    raise InDoubt(f"{why}; asked again: {error}") from error
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)
            else:
                self._links.insert(0, link)
                return outcome

    async def settled(self) -> None:
        """Tell the destination that its answer is on record here."""
        if self._links:
            await confirm(self._links[0])

    async def abort(self, code: str, reason: str) -> None:
        """Send ABORT if the states still allow it; then drop all connections.

        Where none is left, a destination that may be keeping what it has is told in another way that nobody comes.
        """
        told = False
        if self._links and self._protocol.may_send(FrameType.ABORT):
            with contextlib.suppress(LinkLost, TimeoutError, OSError):
                async with asyncio.timeout(_ABORT_TIMEOUT):
                    await self._links[0].send_message(Abort(code=code, reason=reason[:2000] or code))
                    told = True
                    await self._links[0].close()
        for link in self._links:
            link.abort()
        if not told and self._kept_there():
            await self._let_go()

    def _kept_there(self) -> bool:
        """Whether the destination may be waiting for us to come back."""
        if self._welcome is None or self.no_return or self._committed or self._gave_up:
            return False
        return self._protocol.state not in (SourceState.REFUSED, SourceState.RETURNED)

    async def _let_go(self) -> None:
        """Try for a moment to reach a destination that keeps what it has. Only a source that has given up asks."""
        with contextlib.suppress(AmigError, TimeoutError, OSError):
            async with asyncio.timeout(_ABORT_TIMEOUT):
                link, outcome = await query(self._dialer, self._migration, timeout=_ABORT_TIMEOUT)
                self._links.append(link)  # closed with the others
                if outcome is Outcome.DISCARDED:
                    await confirm(link)

    async def close(self) -> None:
        """Close all connections."""
        links, self._links = self._links, []
        for link in links:
            with contextlib.suppress(LinkLost, OSError):
                await link.close()


def _nothing_sent(round_: int) -> None:
    raise PeerError(f"the peer says that it has placed all of round {round_}, which was not sent")


async def _answer(link: FramedConnection) -> Message:
    """Return the peer's next message, answering its pings."""
    while True:
        message = await link.receive()
        if isinstance(message, Ping):
            await link.send_message(Pong(seq=message.seq, sent_ns=message.sent_ns))
        elif not isinstance(message, Pong):
            return message
