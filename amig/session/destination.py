"""What a source session asks of the place a guest goes to: another amig, or a snapshot file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from amig.errors import LinkLost
from amig.guest import Outcome
from amig.stages.resumption import Answer
from amig.stages.send import BlockSink
from amig.wire.messages import Digests, End, Hello

Placed = Callable[[int], None]
"""Called with the number of a round when all of it, and of those before, is safe on the other side."""


class OutOfPatience(LinkLost):
    """The destination, or the connection, is too slow for a guest that waits paused.

    The connection may be dead, so the destination is sought again; but only once, or the guest would be paused in vain
    again and again.
    """


class Destination(Protocol):
    """The far end of a migration. Methods are called in the order in which they stand here.

    After a lost connection it goes on from ``resume`` with ``sinks`` and what follows.
    """

    one_way: bool
    """Whether nothing ever comes back (a file): then there is no handover, and ``commit`` seals."""
    parallel: bool
    """Whether several connections carry more than one."""
    address: str
    no_return: str
    """Why a migration can't go on over another connection once this one is lost; empty when it can."""

    async def open(self, hello: Hello) -> str:
        """Reach it and agree; returns its identity. Raises `Refused`, `LinkLost`, `SnapshotError`."""

    def sinks(self, placed: Placed) -> Sequence[BlockSink]:
        """Return the connections that carry memory."""

    async def round_trip(self) -> float:
        """Return the seconds that a message and its answer take. Raises `LinkLost`."""

    async def listen(self) -> None:
        """Handle what the peer sends until cancelled; raises when it gives up or is lost before COMMIT."""

    async def keep_alive(self) -> None:
        """Watch the connections until cancelled; raises `LinkLost` when nothing moves on them any more."""

    async def resume(self, since: int, round_: int) -> Answer:
        """Reach it again after a `LinkLost`, drop all old connections, and return what it has in place.

        ``since`` is the round with which the source began, ``round_`` that with which it will go on. ``sinks`` comes
        next. Raises `Refused` when it has kept nothing, `LinkLost` when it can't be reached now.
        """

    async def finish(self, state: bytes, pages: Iterable[Digests], end: End) -> None:
        """Send state, digests of ``pages`` if any, and END; wait until the other side has and has verified everything.

        Raises `VerifyFailed` when what it has is not what was sent.
        """

    async def commit(self, migration: str) -> Outcome:
        """Tell that the guest is given away and wait for who runs it. Raises `InDoubt` when no answer comes."""

    async def settled(self) -> None:
        """The answer to ``commit`` is on record at the source: the other side need not keep it. Never raises."""

    async def abort(self, code: str, reason: str) -> None:
        """Say that the migration is off, as well as that still goes; before ``commit`` only. Never raises."""

    async def close(self) -> None:
        """Close all connections. Idempotent."""
