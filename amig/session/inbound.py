"""The destination side of one migration: agree, receive, load, promise, run.

The guest is run only after COMMIT has come and RUNNING is durable. Until PREPARED is sent everything that goes wrong
throws away what came, but for a lost connection while memory comes: then it is kept for a while, and the source may
come back (`amig.session.door`). Between PREPARED and COMMIT a lost connection throws it away, durably (DISCARDED),
before anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hmac
import secrets
import time
from collections.abc import Callable
from typing import Any

from amig.aio import settle, to_its_end
from amig.errors import AmigError, LinkLost, MigrationError, PeerError, Refused, VerifyFailed
from amig.guest import Incoming
from amig.policy import KEEPALIVE, STALL
from amig.session.agreement import told
from amig.session.alive import keep_alive
from amig.session.door import Asked, Door, Return
from amig.session.filling import Filling
from amig.session.questions import UNKNOWN, Answered, Records, WasAsked, answer, attend, confirmed
from amig.session.tasks import one_error
from amig.session.verify import FEATURES, check_features
from amig.transport import Connection, Listener
from amig.transport.framed import FramedConnection
from amig.wire.frametype import FrameType
from amig.wire.messages import (
    BUSY,
    RESUME_FEATURE,
    VERIFY_FAILED,
    Abort,
    Commit,
    Discarded,
    Hello,
    Join,
    Joined,
    Message,
    Mismatch,
    Ping,
    Placed,
    Pong,
    Prepared,
    Query,
    Refuse,
    Resume,
    Resumed,
    Running,
    Welcome,
    agree,
)
from amig.wire.states import DestinationProtocol, DestinationState

HANDSHAKE_TIMEOUT = 10.0
"""Seconds for each message of the handshake."""
COMMIT_TIMEOUT = 60.0
"""Seconds to wait for COMMIT once PREPARED was sent; then the guest is discarded."""
LAST_WORD_TIMEOUT = 2.0


class Phase(enum.StrEnum):
    """Where an arriving migration stands."""

    WAITING = "waiting"
    MEMORY = "memory"
    LOST = "lost"
    """The connection is; what came is kept for a source that comes back."""
    LOADING = "loading"
    PREPARED = "prepared"
    RUNNING = "running"
    DISCARDED = "discarded"


class Inbound:
    """Receives one migration on a connection that was accepted; ``listener`` yields its further connections."""

    def __init__(
        self,
        first: Connection,
        listener: Listener | None,
        guest: Incoming,
        *,
        release: str,
        name: str | None = None,
        workers: int = 1,
        max_streams: int = 64,
        keep: float = 0.0,
        keepalive: float = KEEPALIVE,
        stall: float = STALL,
        on_phase: Callable[[Phase], None] = lambda _: None,
        admit: Callable[[Hello], None] = lambda _: None,
        records: Records | None = None,
    ) -> None:
        """``name`` is what the guest shall be called here; None keeps the source's name.

        ``keep``: seconds that what has come is kept after a lost connection, 0 for not at all; ``keepalive`` and
        ``stall`` as in `amig.policy.Policy`.

        ``admit`` raises `Refused` for a guest that shall not come here, before anything is made for it. ``records`` has
        the answers for a source that asks what became of an earlier migration.
        """
        self._protocol = DestinationProtocol()
        self._link = FramedConnection(first, self._protocol)
        self._links = [self._link]
        self._listener = listener
        self._guest = guest
        self._release = release
        self._name = name
        self._workers = workers
        self._max_streams = max_streams
        self._keep = keep if listener is not None else 0.0
        self._keepalive = keepalive
        self._stall = stall
        self._door: Door | None = None
        self._streams = 1
        self._on_phase = on_phase
        self._admit = admit
        self._records = records or Records()
        self._built = False
        self.phase = Phase.WAITING
        self.migration = ""
        self.hello: Hello | None = None

    async def run(self) -> None:
        """Receive the guest and start it. On any error nothing of it is left; cancelling discards it, too.

        Raises `Refused`, `PeerError`, `LinkLost`, `VerifyFailed`, `MigrationError` (the source gave up), and
        `WasAsked` when there was a question on the connection, which has been answered, or a source that wants to go on
        with a migration that is not here, which has been refused.
        """
        try:
            with one_error():
                hello = await self._agree()
                await self._fill(hello)
                await self._commit()
        except WasAsked:
            raise
        except BaseException as error:
            if self.phase is not Phase.RUNNING:
                await to_its_end(self._discard(error))
            raise
        finally:
            for link in self._links[1:]:
                link.abort()

    async def confirmed(self) -> bool:
        """After a success: wait until the source has RUNNING on record; False when it may have to ask for it."""
        return await confirmed(self._link, self.migration, self._records)

    async def close(self) -> None:
        """Close the connection; after a success, once the source has had its time to read RUNNING."""
        for link in self._links:
            with contextlib.suppress(LinkLost, OSError):
                await link.close()

    async def _agree(self) -> Hello:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                message = await self._link.receive()
        except Mismatch as error:
            await self._refuse("version", str(error))
            raise
        except TimeoutError:
            raise LinkLost(f"{self._link.peer} connected and said nothing") from None
        if isinstance(message, Query):
            raise WasAsked(await answer(self._link, message, self._records))
        if isinstance(message, Resume):
            await self._refuse(UNKNOWN, f"nothing is kept here of migration {message.migration}")
            # Of a migration that this receiver never had, or has let go: no reason to stop waiting for one.
            raise WasAsked(Answered(message.migration, None, confirmed=False), wanted="wanted to go on with")
        if not isinstance(message, Hello):
            await self._refuse("not-migrating", "no migration is under way here")
            raise PeerError(f"{self._link.peer} sent {type(message).__name__} to a host that waits for a migration")
        self.hello, self.migration = message, message.migration
        try:
            features = agree(message, (*FEATURES, RESUME_FEATURE) if self._keep else FEATURES)
            check_features(message, features)
            self._admit(message)
            identity = await self._guest.build(
                name=self._name or message.name, machine=message.machine, memory=message.memory
            )
            self._built = True
            await self._guest.expect(message.migration)
        except (Refused, AmigError) as error:
            await self._refuse("refused", str(error))
            raise
        token = secrets.token_bytes(32)
        self._streams = streams = min(message.streams, self._max_streams) if self._listener else 1
        await self._link.send_message(
            Welcome(
                migration=message.migration,
                name=self._name or message.name,
                identity=identity,
                token=token,
                features=features,
                streams=streams,
                amig=self._release,
            )
        )
        await self._join(message, token)
        if RESUME_FEATURE in features and self._listener is not None:
            self._door = Door(
                self._listener,
                self._records,
                migration=message.migration,
                token=token,
                identity=self._link.connection.identity,
                name=self._name or message.name,
            )
        return message

    async def _join(self, hello: Hello, token: bytes) -> None:
        streams = self._streams
        waiting = set(range(1, streams))
        sources: dict[int, FramedConnection] = {}
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                while waiting and self._listener is not None:
                    link = FramedConnection(await self._listener.accept(), DestinationProtocol())
                    stream = await self._joining(link, hello, token, waiting)
                    if stream is None:
                        link.abort()
                    else:
                        waiting.remove(stream)
                        sources[stream] = link
                        self._links.append(link)
        except TimeoutError:
            raise LinkLost(f"{len(waiting)} of {streams} connections of the migration never came") from None

    async def _joining(self, link: FramedConnection, hello: Hello, token: bytes, waiting: set[int]) -> int | None:
        """Return the stream number that a connection proved to be; None for a stranger."""
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT / 2):
                message = await link.receive()
                if (
                    isinstance(message, Join)
                    and hmac.compare_digest(link.connection.identity, self._link.connection.identity)
                    and message.stream in waiting
                    and message.migration == hello.migration
                    and hmac.compare_digest(message.token, token)
                ):
                    await link.send_message(Joined(stream=message.stream))
                    return message.stream
                self._not_back(link, message)
                await link.send_message(Refuse(code=BUSY, reason="another migration is arriving here"))
        except _Back:
            raise
        except (LinkLost, PeerError, TimeoutError):
            pass
        except BaseException:  # we have no more time for the others, either
            link.abort()
            raise
        return None

    def _not_back(self, link: FramedConnection, message: Message) -> None:
        """Raise `_Back` for a source that has lost its connection again, and does not come with JOIN."""
        if self._door is not None and self._door.keep(link, message):
            raise _Back(f"{link.peer} has lost its connection, and is back")

    async def _fill(self, hello: Hello) -> None:
        self._enter(Phase.MEMORY)
        door = self._door
        filling = Filling(self._guest, hello, workers=self._workers, keeps=door is not None)
        if door is None:
            await self._receive(filling)
        else:
            door.check = lambda message: filling.placement.check(message.since, message.round)
            try:
                while (back := await self._until_back(filling, door)) is not None:
                    await self._go_on(hello, filling, back)
            finally:
                door.close()
        self._enter(Phase.LOADING)
        began = time.monotonic_ns()
        await filling.load()
        await self._link.send_message(Prepared(migration=self.migration, load_ns=time.monotonic_ns() - began))
        self._enter(Phase.PREPARED)

    async def _receive(self, filling: Filling) -> None:
        """Receive over the connections that there are. Raises `LinkLost` when one is lost, or nothing moves."""
        links = self._links

        def drop(_: object) -> None:  # not cancelled: what has come is still placed
            for link in links:
                link.abort()

        def filling_up() -> bool:
            return self._protocol.state in (DestinationState.MEMORY, DestinationState.SWITCHOVER)

        watch = asyncio.ensure_future(keep_alive(links, every=self._keepalive, limit=self._stall, while_=filling_up))
        watch.add_done_callback(drop)
        try:
            with one_error():
                await filling.receive(links, self._placed)
        except LinkLost:
            if watch.done():
                watch.result()  # says more than that it was closed on this side
            raise
        finally:
            watch.remove_done_callback(drop)
            await _ended(watch)

    async def _until_back(self, filling: Filling, door: Door) -> Return | None:
        """Receive until everything has come, and return None; or until the source comes over a new connection.

        It may come before the loss is noticed here. What had come whole is in place then.
        """
        back = asyncio.ensure_future(door.opened())
        receiving = asyncio.ensure_future(self._receiving(filling))
        came: Return | None = None
        try:
            await asyncio.wait({back, receiving}, return_when=asyncio.FIRST_COMPLETED)
            if back.done() and _heard(back):
                for link in self._links:
                    link.abort()
            lost = await receiving
            if lost is not None:
                for link in self._links:  # those that still carry must tell the source
                    link.abort()
                if not back.done():
                    self._enter(Phase.LOST)
            if lost is not None or (back.done() and back.exception() is None):
                came = await self._kept(back, lost)
            return came
        finally:
            await _ended(receiving)
            await _ended(back)
            if came is None and not back.cancelled() and back.exception() is None:
                back.result().link.abort()

    async def _kept(self, back: asyncio.Future[Return], lost: LinkLost | None) -> Return:
        assert self._door is not None  # noqa: S101 - it is what is waited at
        self._door.kept_until = time.monotonic() + self._keep
        try:
            async with asyncio.timeout(self._keep):
                return await asyncio.shield(back)
        except TimeoutError:
            raise LinkLost(f"{lost}; the source did not come back within {self._keep:g} s (--keep)") from lost
        finally:
            self._door.kept_until = None

    async def _receiving(self, filling: Filling) -> LinkLost | None:
        if self._streams > len(self._links):  # not all have joined: the source is on its way again
            return LinkLost(f"the connection to {self._link.peer} was lost before the others came")
        try:
            await self._receive(filling)
        except LinkLost as lost:
            return LinkLost(str(lost))  # without its traceback, which holds the pipeline and what that has mapped
        return None

    async def _go_on(self, hello: Hello, filling: Filling, back: Return) -> None:
        """Tell the source what is here, and take its further connections."""
        for link in self._links:
            link.abort()
        self._link, self._links = back.link, [back.link]
        assert isinstance(back.link.protocol, DestinationProtocol)  # noqa: S101 - the door has made it
        self._protocol = back.link.protocol
        try:
            answer = filling.placement.go_on(back.message.since, back.message.round)
        except PeerError as error:  # it could be when it was let in; what was on its way then has been placed since
            await self._refuse("stale", str(error))
            back.link.abort()
            return
        token = secrets.token_bytes(32)
        try:
            for part in told(answer.held):
                await self._say(part)
            await self._say(Resumed(migration=self.migration, rounds=answer.rounds, token=token))
            await self._join(hello, token)
            self._enter(Phase.MEMORY)
        except LinkLost:  # then it comes again
            back.link.abort()

    async def _say(self, message: Message) -> None:
        """Send while nothing watches the connection. Raises `LinkLost` when the source does not take it in time."""
        try:
            async with asyncio.timeout(self._stall):
                await self._link.send_message(message)
        except TimeoutError:
            raise LinkLost(
                f"{self._link.peer} did not take {type(message).__name__} within {self._stall:g} s"
            ) from None

    async def _placed(self, round_: int) -> None:
        if not self._protocol.may_send(FrameType.PLACED):  # not when the source is just saying why it gives up
            return
        try:
            await self._link.send_message(Placed(round=round_))
        except LinkLost:
            if self._door is None:
                raise
            for link in self._links:  # whoever receives notices, and what has come is still placed
                link.abort()

    async def _commit(self) -> None:
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT):
                await self._decided()
        except TimeoutError:
            raise LinkLost(f"the source did not commit within {COMMIT_TIMEOUT:g} s") from None
        began = time.monotonic_ns()
        await to_its_end(self._take_over(began))

    async def _decided(self) -> None:
        """Wait for COMMIT. A source that has lost this connection, unnoticed here, may ask on another one."""
        async with asyncio.TaskGroup() as group:
            attendant = group.create_task(self._attend())
            await self._await_commit()
            attendant.cancel()

    async def _attend(self) -> None:
        if self._listener is None:
            return

        def ours(answered: Answered) -> bool:
            return answered.migration == self.migration and answered.outcome is not None

        try:
            await attend(self._listener, self._records, until=ours)
        except AmigError:
            return  # nobody can come; the connection that we have is not the worse for it
        raise MigrationError("the source lost this connection after COMMIT and asked on another: it keeps the guest")

    async def _await_commit(self) -> None:
        while True:
            message: Message = await self._link.receive()
            match message:
                case Commit() if message.migration == self.migration:
                    return
                case Commit():
                    raise PeerError("the source committed another migration")
                case Abort():
                    raise MigrationError(f"the source gave up: {message.reason}")
                case Ping():
                    await self._link.send_message(Pong(seq=message.seq, sent_ns=message.sent_ns))
                case _:
                    pass

    async def _take_over(self, began: int) -> None:
        await self._guest.commit(self.migration)
        self._enter(Phase.RUNNING)  # durable: from here on it is ours, whatever becomes of the connection
        await self._guest.run()
        with contextlib.suppress(LinkLost):
            await self._link.send_message(Running(migration=self.migration, start_ns=time.monotonic_ns() - began))
        await self._guest.settle()

    async def _discard(self, error: BaseException) -> None:
        after_promise = self._protocol.state in (
            DestinationState.PREPARED,
            DestinationState.COMMITTED,
            DestinationState.UNDECIDED,
        )
        try:
            if self._built:
                await self._guest.discard(self.migration)
        except AmigError as failed:
            if after_promise:  # not durable, so it can't be said: the source asks later, and decides it by that
                self._enter(Phase.DISCARDED)
                self._link.abort()
                raise MigrationError(f"{error}; and then: {failed}") from failed
        self._enter(Phase.DISCARDED)
        reason = str(error) or type(error).__name__
        code = VERIFY_FAILED if isinstance(error, VerifyFailed) else "failed"
        with contextlib.suppress(LinkLost, TimeoutError, OSError, RuntimeError):
            async with asyncio.timeout(LAST_WORD_TIMEOUT):
                if after_promise and self._protocol.may_send(FrameType.DISCARDED):
                    await self._link.send_message(Discarded(migration=self.migration, reason=reason))
                    await confirmed(self._link, self.migration, self._records)
                elif self._protocol.may_send(FrameType.ABORT):
                    await self._link.send_message(Abort(code=code, reason=reason))
                await self._link.close()
        self._link.abort()

    async def _refuse(self, code: str, reason: str) -> None:
        with contextlib.suppress(LinkLost, TimeoutError, OSError):
            async with asyncio.timeout(LAST_WORD_TIMEOUT):
                await self._link.send_message(Refuse(code=code, reason=reason))
                await self._link.close()

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._on_phase(phase)


class _Back(LinkLost):
    """The source has come with RESUME while its JOIN was awaited."""


def _heard(back: asyncio.Future[Return]) -> bool:
    """Whether the source has come; raises when it wants no more. That nobody can come is no harm yet."""
    error = back.exception()
    if error is not None and (isinstance(error, Asked) or not isinstance(error, AmigError)):
        raise error
    return error is None


async def _ended(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end; what came of it is known, or of no use any more."""
    task.cancel()
    cancelled = await settle(task)
    if not task.cancelled():
        task.exception()
    if cancelled is not None:
        raise cancelled
