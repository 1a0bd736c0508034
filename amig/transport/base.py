"""The seam between the wire and what carries it: a connection moves bytes and knows nothing of frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from amig.pieces import Pieces

if TYPE_CHECKING:
    from typing_extensions import Buffer


class PageMover(Protocol):
    """A connection whose bytes the kernel copies straight from, and to, where they lie."""

    async def send_pieces(self, head: bytes, pieces: Pieces) -> None:
        """As `Connection.send`, of ``head`` and then of memory that a guest may be writing to."""

    async def recv_pieces(self, pieces: Pieces) -> None:
        """As `Connection.recv_into`."""


class Connection(Protocol):
    """A byte stream to one peer. One task may send while another receives; two may not do the same at once."""

    @property
    def pages(self) -> PageMover | None:
        """How to move guest memory without looking at it; None where it has to be (TLS, a file)."""

    @property
    def peer(self) -> str:
        """Who is at the other end, for people."""

    @property
    def identity(self) -> bytes:
        """What the peer has proved to be, the same on each of its connections; empty where nothing is proved."""

    @property
    def bytes_sent(self) -> int:
        """Bytes that the kernel has taken from us, before encryption."""

    @property
    def bytes_received(self) -> int:
        """Bytes that have come."""

    async def send(self, *buffers: Buffer) -> None:
        """Send all buffers, gathered in order; the caller may reuse them once this has returned.

        Raises `LinkLost`. Cancelled in the middle, it leaves nothing more to be sent here, since the peer has a part;
        what the peer sent can still be received.
        """

    async def recv_into(self, *views: Buffer) -> None:
        """Fill all views, in order and to the last byte.

        Raises `LinkLost`, which says how much came, when the peer ends the stream before that. Cancelled in the middle,
        it leaves nothing more to be received here; cancelled before the first byte, it has done nothing.
        """

    def outstanding(self) -> int | None:
        """Bytes sent that the peer's kernel has not acknowledged; None where that can't be known."""

    async def close(self) -> None:
        """End the stream after everything sent, and give the peer a moment to take it. Idempotent."""

    def abort(self) -> None:
        """Drop the connection at once; whoever waits on it gets `LinkLost`. Idempotent."""


class Listener(Protocol):
    """Waits for peers."""

    @property
    def address(self) -> str:
        """Where it listens, with the real port."""

    async def accept(self) -> Connection:
        """Return the next connection; cancelling loses none. Raises `HostError` once closed."""

    async def close(self) -> None:
        """Stop listening; connections live on. Idempotent."""
