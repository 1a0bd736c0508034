"""The destination's answers to QUERY: what became of a migration, from its durable record.

A source asks only after it has sent COMMIT and has lost the answer. ``RUNNING`` and ``DISCARDED`` are said from the
record; a migration that is still arriving is decided by the question (`amig.host.handover.Records.outcome`). One that
nothing is known of is refused with code ``unknown``: perhaps it went elsewhere, so that says nothing about who runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import NamedTuple

from amig.aio import settled
from amig.errors import AmigError, LinkLost, MigrationError, PeerError
from amig.guest import Outcome
from amig.host import handover
from amig.transport import Connection, Listener
from amig.transport.framed import FramedConnection
from amig.wire.messages import BUSY, Discarded, Ping, Query, Refuse, Running
from amig.wire.states import DestinationProtocol

PATIENCE = 10.0
"""Seconds for a question to come on a connection, and for the answer to be confirmed."""

UNKNOWN = "unknown"
"""Code of the REFUSE for a migration that was never here."""


class Records:
    """Where the answers are. This one knows nothing."""

    async def outcome(self, migration: str) -> Outcome | None:
        """Return, durably, who runs the guest; None where nothing is known."""
        return None

    async def settled(self, migration: str) -> None:
        """The source has the answer on record."""


class HostRecords(Records):
    """The durable answers of this user's hosts on this machine."""

    def __init__(self, records: handover.Records) -> None:
        self._records = records

    async def outcome(self, migration: str) -> Outcome | None:
        """See `Records.outcome`."""
        return await settled(asyncio.to_thread(self._records.outcome, migration))

    async def settled(self, migration: str) -> None:
        """See `Records.settled`."""
        await settled(asyncio.to_thread(self._records.settled, migration))


class Answered(NamedTuple):
    """A question that was answered."""

    migration: str
    outcome: Outcome | None
    """None: nothing is known of it, or it could not be found out."""
    confirmed: bool
    """Whether the source has it on record."""


class WasAsked(MigrationError):
    """The connection brought a question, which has been answered, and no migration."""

    def __init__(self, answered: Answered, wanted: str = "asked what became of") -> None:
        said = answered.outcome or "nothing is known"
        super().__init__(f"somebody {wanted} migration {answered.migration}: {said}")
        self.answered = answered


async def answer(link: FramedConnection, query: Query, records: Records) -> Answered:
    """Answer a question, and wait for the source to have the answer on record.

    Never raises for what the peer or the disk does: then the question stays open, and will be asked again.
    """
    migration = query.migration
    outcome: Outcome | None = None
    with contextlib.suppress(LinkLost, PeerError, TimeoutError, OSError):
        try:
            outcome = await records.outcome(migration)
        except AmigError as error:
            await link.send_message(Refuse(code="failed", reason=str(error)))
            return Answered(migration, None, False)
        match outcome:
            case Outcome.RUNNING:
                await link.send_message(Running(migration=migration))
            case Outcome.DISCARDED:
                await link.send_message(Discarded(migration=migration, reason="it was not committed here in time"))
            case None:
                reason = f"nothing is known here of migration {migration}"
                await link.send_message(Refuse(code=UNKNOWN, reason=reason))
                return Answered(migration, None, False)
        return Answered(migration, outcome, await confirmed(link, migration, records))
    return Answered(migration, outcome, False)


async def confirmed(link: FramedConnection, migration: str, records: Records) -> bool:
    """Wait for the PING that says that the source has our answer on record; False when it does not come."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not isinstance(await link.receive(), Ping):
                pass
    except (LinkLost, PeerError, TimeoutError):
        return False
    with contextlib.suppress(AmigError):
        await records.settled(migration)
    return True


async def attend(listener: Listener, records: Records, *, until: Callable[[Answered], bool]) -> None:
    """Answer whoever comes, until ``until`` says that this was the last; who does not ask is refused.

    One at a time: each has `PATIENCE`. Cancelling ends it.
    """
    while True:
        answered = await answer_only(await listener.accept(), records)
        if answered is not None and until(answered):
            return


async def answer_only(connection: Connection, records: Records) -> Answered | None:
    """Answer the question on a connection and close it; refuse anything else, and return None."""
    link = FramedConnection(connection, DestinationProtocol())
    answered: Answered | None = None
    try:
        async with asyncio.timeout(2 * PATIENCE):
            message = await link.receive()
            if isinstance(message, Query):
                answered = await answer(link, message, records)
            else:
                await link.send_message(Refuse(code=BUSY, reason="there is a guest here already"))
            await link.close()
    except (LinkLost, PeerError, TimeoutError, OSError):
        pass
    finally:
        link.abort()
    return answered
