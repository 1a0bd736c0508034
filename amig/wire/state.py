"""STATE: device and vCPU state, in parts that state the total first.

::

    u64 total bytes │ u64 offset of this part │ the part
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from amig.errors import PeerError
from amig.wire import limits
from amig.wire.frames import STATE_HEADER_SIZE

if TYPE_CHECKING:
    from typing_extensions import Buffer

_HEADER: Final = struct.Struct("<QQ")
assert _HEADER.size == STATE_HEADER_SIZE  # noqa: S101 - the layout's proof, checked once at import


def digest(state: Buffer) -> bytes:
    """Return what END states about the whole state: BLAKE2b-256."""
    return hashlib.blake2b(state, digest_size=32).digest()


def split(state: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield header and content of every STATE frame for ``state``; raises `ValueError` outside the limits."""
    if not 0 < len(state) <= limits.MAX_STATE:
        raise ValueError(f"a state of {len(state)} bytes (allowed: 1 to {limits.MAX_STATE})")
    view = memoryview(state)
    for offset in range(0, len(state), limits.MAX_STATE_PART):
        yield _HEADER.pack(len(state), offset), view[offset : offset + limits.MAX_STATE_PART]


class StateAssembler:
    """Puts the parts together again; holds no more than has arrived."""

    def __init__(self) -> None:
        self._parts = bytearray()
        self._total = 0

    @property
    def complete(self) -> bool:
        """Whether every part has come."""
        return 0 < self._total == len(self._parts)

    def add(self, payload: Buffer) -> bool:
        """Take the payload of one STATE frame and return `complete`; raises `PeerError` for one out of order."""
        view = memoryview(payload).cast("B")
        if len(view) <= STATE_HEADER_SIZE:
            raise PeerError(f"the peer sent a STATE frame of {len(view)} bytes")
        total, offset = _HEADER.unpack(view[:STATE_HEADER_SIZE])
        part = view[STATE_HEADER_SIZE:]
        if not 0 < total <= limits.MAX_STATE or (self._total and total != self._total):
            raise PeerError(f"the peer announced a state of {total} bytes (at most {limits.MAX_STATE})")
        if offset != len(self._parts) or offset + len(part) > total or len(part) > limits.MAX_STATE_PART:
            raise PeerError(f"the peer sent state bytes {offset}+{len(part)} of {total} out of order")
        self._total = total
        self._parts += part
        return self.complete

    def take(self) -> bytes:
        """Return the whole state; raises `PeerError` while a part is missing."""
        if not self.complete:
            raise PeerError(f"the peer sent {len(self._parts)} of {self._total} bytes of state")
        return bytes(self._parts)
