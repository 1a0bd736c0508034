"""Where the source of a migration comes back after its connection was lost.

It shows the migration's id, the token from WELCOME and, where identities are proved, the identity of the first
connection. Whoever does not is refused, and changes nothing. A question what became of the migration (QUERY) is
answered, and thereby ends it: only a source that has given up asks that.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import NamedTuple

from amig.errors import LinkLost, MigrationError, PeerError
from amig.session.questions import Records, answer
from amig.transport import Listener
from amig.transport.framed import FramedConnection
from amig.wire.messages import Query, Refuse, Resume
from amig.wire.states import DestinationProtocol

PATIENCE = 5.0
"""Seconds that whoever connects has to say what it wants."""


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

    async def opened(self) -> Return:
        """Wait until the source is back. Raises `Asked` when it has asked instead, `HostError` when closed.

        Cancelled, it has let nobody in; who was just being looked at is dropped.
        """
        if self._came is not None:
            came, self._came = self._came, None
            return came
        while True:
            link = FramedConnection(await self._listener.accept(), DestinationProtocol())
            admitted = False
            try:
                message = await self._look(link)
                if message is not None:
                    admitted = True
                    return Return(link, message)
            finally:
                if not admitted:
                    link.abort()

    def keep(self, link: FramedConnection, message: object) -> bool:
        """Have the next `opened` return this connection, if it is the source's; for one that came by another way."""
        if not self._is_source(link, message):
            return False
        assert isinstance(message, Resume)  # noqa: S101 - as was just seen
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
            if self._is_source(link, message):
                assert isinstance(message, Resume)  # noqa: S101 - as was just seen
                return message
            if isinstance(message, Query):
                answered = await answer(link, message, self._records)
                if answered.migration == self._migration and answered.outcome is not None:
                    raise Asked(f"the source asked what became of migration {self._migration}: it keeps the guest")
            else:
                async with asyncio.timeout(PATIENCE):
                    await link.send_message(Refuse(code="busy", reason=f"guest {self._name} is arriving here"))
                    await link.close()
        except (LinkLost, PeerError, TimeoutError):
            pass
        return None

    def _is_source(self, link: FramedConnection, message: object) -> bool:
        return (
            isinstance(message, Resume)
            and message.migration == self._migration
            and hmac.compare_digest(message.token, self._token)
            and hmac.compare_digest(link.connection.identity, self._identity)
        )
