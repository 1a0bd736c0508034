"""Where the source of a migration comes back after its connection was lost.

It shows the migration's id, the token from WELCOME and, where identities are proved, the identity of the first
connection. Whoever does not is refused, and changes nothing; so is what it said on the way to an earlier return, when
that comes late. A question what became of the migration (QUERY) is answered, and thereby ends it: only a source that
has given up asks that.

Those who come are looked at side by side, so that whoever connects and says nothing keeps no source waiting. There are
only so many places; when they are full, the one that has been there longest goes.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

from amig.aio import to_its_end
from amig.errors import LinkLost, MigrationError, PeerError
from amig.session.questions import Records, answer
from amig.transport import Connection, Listener
from amig.transport.framed import FramedConnection
from amig.wire.messages import BUSY, Message, Query, Refuse, Resume
from amig.wire.states import DestinationProtocol

PATIENCE = 5.0
"""Seconds that whoever connects has to say what it wants."""
MAX_STRANGERS = 32


class Asked(MigrationError):
    """The source wants to know what became of the migration, and so has given it up."""


class Return(NamedTuple):
    """The source is back, on this connection."""

    link: FramedConnection
    message: Resume


class Door:
    """Lets one source back in, as often as it comes."""

    def __init__(
        self, listener: Listener, records: Records, *, migration: str, token: bytes, identity: bytes, name: str
    ) -> None:
        self._listener = listener
        self._records = records
        self._migration = migration
        self._token = token
        self._identity = identity
        self._name = name
        self._came: Return | None = None
        self._asking: set[FramedConnection] = set()
        """Those on which our migration's own question is being answered."""
        self.check: Callable[[Resume], object] = lambda _: None
        """Raises `PeerError` for a RESUME that can't be the source's next word."""
        self.kept_until: float | None = None
        """Monotonic time until which what came is kept; None while the source is not missed."""

    async def opened(self) -> Return:
        """Wait until the source is back. Raises `Asked` when it has asked instead, `HostError` when closed.

        Cancelled, it has let nobody in; who was just being looked at is dropped.
        """
        if self._came is not None:
            came, self._came = self._came, None
            return came
        looks: dict[asyncio.Task[Resume | None], FramedConnection] = {}
        accepting: asyncio.Task[Connection] | None = None
        back: Return | None = None
        try:
            while back is None:
                accepting = accepting or asyncio.create_task(self._listener.accept())
                await asyncio.wait({accepting, *looks}, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in looks if task.done()]:
                    link = looks.pop(task)
                    try:
                        message = None if task.cancelled() else task.result()
                    except BaseException:
                        await to_its_end(link.close())  # it has been answered: let that be read
                        raise
                    if message is not None and back is None:
                        back = Return(link, message)
                    else:
                        link.abort()
                if accepting.done() and back is None:
                    link, accepting = FramedConnection(accepting.result(), DestinationProtocol()), None
                    self._make_room(looks)
                    looks[asyncio.create_task(self._look(link))] = link
            left, accepting = accepting, None
            await to_its_end(_dropped(looks, left))
            returned, back = back, None
            return returned
        finally:
            if back is not None:  # cancelled at the last moment
                back.link.abort()
            if accepting is not None or looks:
                await to_its_end(_dropped(looks, accepting))

    def _make_room(self, looks: dict[asyncio.Task[Resume | None], FramedConnection]) -> None:
        staying = [task for task, link in looks.items() if not task.cancelling() and link not in self._asking]
        if len(staying) >= MAX_STRANGERS:
            staying[0].cancel()

    def keep(self, link: FramedConnection, message: object) -> bool:
        """Have the next `opened` return this connection, if it is the source's; for one that came by another way."""
        if not self._is_source(message, link) or self._stale(message):
            return False
        if self._came is not None:
            self._came.link.abort()
        self._came = Return(link, message)
        return True

    def close(self) -> None:
        """Drop a source that has come and was not let in."""
        if self._came is not None:
            self._came.link.abort()
            self._came = None

    async def _look(self, link: FramedConnection) -> Resume | None:
        try:
            async with asyncio.timeout(PATIENCE):
                message = await link.receive()
            if isinstance(message, Query):
                await self._answer(link, message)
            elif self._is_source(message, link) and not self._stale(message):
                return message
            else:
                async with asyncio.timeout(PATIENCE):
                    await link.send_message(self._refusal(link, message))
                    await link.close()
        except (LinkLost, PeerError, TimeoutError):
            pass
        return None

    async def _answer(self, link: FramedConnection, message: Query) -> None:
        if message.migration == self._migration:
            self._asking.add(link)
        try:
            answered = await answer(link, message, self._records)
        finally:
            self._asking.discard(link)
        if answered.migration == self._migration and answered.outcome is not None:
            raise Asked(f"the source asked what became of migration {self._migration}: it keeps the guest")

    def _refusal(self, link: FramedConnection, message: Message) -> Refuse:
        if self._is_source(message, link):
            return Refuse(code="stale", reason=self._stale(message))
        if self.kept_until is None:
            return Refuse(code=BUSY, reason=f"guest {self._name} is arriving here")
        left = max(math.ceil(self.kept_until - time.monotonic()), 1)
        reason = (
            f"guest {self._name} is kept here for a source that lost its connection, for {left} s more (--keep): wait, "
            f"or end it there with `amig stop {self._name}` and start `amig receive` again"
        )
        return Refuse(code=BUSY, reason=reason)

    def _stale(self, message: Resume) -> str:
        """Return why this can't be what the source says next; empty when it can."""
        if self._asking:  # the answer is durable, or is just becoming so
            return f"it was asked what became of migration {self._migration}: it is over"
        try:
            self.check(message)
        except PeerError as error:
            return str(error)
        return ""

    def _is_source(self, message: object, link: FramedConnection) -> TypeGuard[Resume]:
        return (
            isinstance(message, Resume)
            and message.migration == self._migration
            and hmac.compare_digest(message.token, self._token)
            and hmac.compare_digest(link.connection.identity, self._identity)
        )


async def _dropped(
    looks: dict[asyncio.Task[Resume | None], FramedConnection], accepting: asyncio.Task[Connection] | None
) -> None:
    """End all that is under way at the door."""
    tasks: list[asyncio.Task[Any]] = [*looks, *([accepting] if accepting is not None else [])]
    for task in tasks:
        task.cancel()
    for link in looks.values():
        link.abort()
    looks.clear()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at: what comes of it is of no use any more
    if accepting is not None and not accepting.cancelled() and accepting.exception() is None:
        accepting.result().abort()
