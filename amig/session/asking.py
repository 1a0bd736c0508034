"""What a source asks after a lost answer to COMMIT: whether the destination runs the guest.

Only the destination's durable word settles a handover: RUNNING lets the source go, DISCARDED gives the guest back.
Everything else (no connection, "busy", nothing known there) leaves it in doubt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from amig.errors import LinkLost, PeerError, Refused
from amig.guest import Outcome
from amig.transport import Dialer, LinkOptions
from amig.transport.framed import FramedConnection
from amig.wire.messages import Discarded, Message, Ping, Query, Refuse, Running
from amig.wire.states import SourceProtocol

PATIENCE = 10.0
"""Seconds for a connection and for an answer."""


async def query(dialer: Dialer, migration: str, *, timeout: float = PATIENCE) -> tuple[FramedConnection, Outcome]:
    """Ask over a fresh connection; returns it, to be `confirm`-ed or aborted, and the answer.

    Raises `Refused` (the text says why: nothing known there, or busy), `LinkLost`, `PeerError`, `Untrusted`,
    `HostError`; within twice ``timeout`` seconds.
    """
    link = FramedConnection(await dialer.connect(timeout=timeout, asking=True), SourceProtocol())
    try:
        async with asyncio.timeout(timeout):
            await link.send_message(Query(migration=migration))
            message = await link.receive()
        return link, _outcome(message, migration, dialer.address)
    except TimeoutError:
        link.abort()
        raise LinkLost(f"{dialer.address} did not say within {timeout:g} s who runs the guest") from None
    except BaseException:
        link.abort()
        raise


def _outcome(message: Message, migration: str, address: str) -> Outcome:
    match message:
        case Running() if message.migration == migration:
            return Outcome.RUNNING
        case Discarded() if message.migration == migration:
            return Outcome.DISCARDED
        case Refuse():
            raise Refused(f"{address} was asked who runs the guest: {message.reason}")
    raise PeerError(f"{address} answered for another migration")


async def confirm(link: FramedConnection) -> None:
    """Tell that the answer is on record here, so that the destination need not keep it. Never raises."""
    with contextlib.suppress(LinkLost, PeerError, OSError):
        await link.send_message(Ping(seq=0, sent_ns=0))


@asynccontextmanager
async def asked(
    destination: str, migration: str, link: LinkOptions | None = None, *, timeout: float = PATIENCE
) -> AsyncIterator[Outcome]:
    """Ask, and yield the answer, which the block makes durable; its end without an error confirms it.

    Raises what `query` raises, and `UsageError` where the destination can't be asked again (a snapshot file, a pairing
    that is over, certificates that are missing).
    """
    connection, outcome = await query(Dialer(destination, link), migration, timeout=timeout)
    try:
        yield outcome
        await confirm(connection)
        with contextlib.suppress(LinkLost, OSError):
            await connection.close()
    finally:
        connection.abort()
