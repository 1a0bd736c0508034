"""What a source session asks of the place a guest goes to: another amig, or a snapshot file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from amig.guest import Outcome
from amig.stages.send import BlockSink
from amig.wire.messages import Digests, End, Hello

Placed = Callable[[int], None]
"""Called with the number of a round when all of it, and of those before, is safe on the other side."""


class Destination(Protocol):
    """The far end of a migration. Methods are called in the order in which they stand here."""

    one_way: bool
    """Whether nothing ever comes back (a file): then there is no handover, and ``commit`` seals."""
    address: str

    async def open(self, hello: Hello) -> str:
        """Reach it and agree; returns its identity. Raises `Refused`, `LinkLost`, `SnapshotError`."""

    async def round_trip(self) -> float:
        """Return the seconds that a message and its answer take."""

    def sinks(self, placed: Placed) -> Sequence[BlockSink]:
        """Return the connections that carry memory."""

    async def listen(self) -> None:
        """Handle what the peer sends until cancelled; raises when it gives up or is lost before COMMIT."""

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
