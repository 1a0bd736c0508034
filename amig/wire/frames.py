"""The frame header: 16 bytes that say what follows, how long it is, and what it must hash to.

::

    u32 payload length │ u8 type │ u8 flags │ u16 reserved, 0 │ u64 checksum

The checksum is XXH3-64 of the payload, seeded with the first 8 bytes of the header read as a little-endian number, so
that a header that was damaged fails it too. A BLOCK whose page data goes to the kernel straight from live guest memory
can't be summed, since the guest may write between the summing and the copying: its flag `UNSUMMED_DATA` says that only
the block header and the bitmaps are covered.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import xxhash

from amig.errors import PeerError
from amig.wire import limits
from amig.wire.frametype import FrameType

if TYPE_CHECKING:
    from typing_extensions import Buffer

_HEADER: Final = struct.Struct("<IBBHQ")
_SEED: Final = struct.Struct("<IBBH")
HEADER_SIZE: Final = _HEADER.size

UNSUMMED_DATA: Final = 1
"""Flag of a BLOCK: the checksum covers block header and bitmaps only."""

BLOCK_HEADER_SIZE: Final = 40
STATE_HEADER_SIZE: Final = 16

_CONTROL: Final = (1, limits.MAX_CONTROL)
PAYLOAD_SIZES: Final[Mapping[FrameType, tuple[int, int]]] = dict.fromkeys(FrameType, _CONTROL) | {
    FrameType.HELLO: (1, limits.MAX_HELLO),
    FrameType.BLOCK: (
        BLOCK_HEADER_SIZE + 16,
        BLOCK_HEADER_SIZE + 2 * limits.MAX_BITMAP + limits.MAX_BLOCK_DATA,
    ),
    FrameType.STATE: (STATE_HEADER_SIZE + 1, STATE_HEADER_SIZE + limits.MAX_STATE_PART),
}
"""Fewest and most bytes in the payload of each type."""

_BY_NUMBER: Final[Mapping[int, tuple[FrameType, int, int]]] = {
    int(kind): (kind, low, high) for kind, (low, high) in PAYLOAD_SIZES.items()
}


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A checked frame header; ``length`` is within the limits of ``type``."""

    type: FrameType
    length: int
    checksum: int
    flags: int = 0

    @property
    def data_is_summed(self) -> bool:
        """Whether the checksum covers the page data of a BLOCK as well."""
        return not self.flags & UNSUMMED_DATA


class Checksum:
    """XXH3-64 over the parts of one payload, in order, without joining them."""

    __slots__ = ("_hash", "update")

    def __init__(self, kind: FrameType, length: int, flags: int = 0) -> None:
        self._hash = xxhash.xxh3_64(seed=_seed(kind, length, flags))
        self.update = self._hash.update

    def value(self) -> int:
        """Return the checksum of all parts so far."""
        return self._hash.intdigest()


def checksum(kind: FrameType, length: int, *parts: Buffer, flags: int = 0) -> int:
    """Return the checksum of a payload of ``length`` bytes given in parts."""
    total = Checksum(kind, length, flags)
    for part in parts:
        total.update(part)
    return total.value()


def encode_header(kind: FrameType, length: int, total: int, flags: int = 0) -> bytes:
    """Return the 16 bytes of a frame header; raises `ValueError` for a payload this type may not have: our own bug."""
    low, high = PAYLOAD_SIZES[kind]
    if not low <= length <= high:
        raise ValueError(f"a {kind.name} frame with a payload of {length} bytes (allowed: {low} to {high})")
    return _HEADER.pack(length, kind, flags, 0, total)


def decode_header(data: Buffer) -> FrameHeader:
    """Return the frame header in ``data`` (16 bytes); raises `PeerError` for one that no sender may write."""
    length, number, flags, reserved, total = _HEADER.unpack(data)
    known = _BY_NUMBER.get(number)
    if known is None:
        raise PeerError(f"the peer sent a frame of unknown type {number}: not amig, or another version of it")
    kind, low, high = known
    if not low <= length <= high:
        raise PeerError(f"the peer sent a {kind.name} frame of {length} bytes (allowed: {low} to {high})")
    if reserved or flags & ~(UNSUMMED_DATA if kind is FrameType.BLOCK else 0):
        raise PeerError(f"the peer sent a {kind.name} frame with unknown flags {flags:#x}, {reserved:#x}")
    return FrameHeader(kind, length, total, flags)


def frame(kind: FrameType, payload: Buffer) -> tuple[bytes, Buffer]:
    """Return header and payload of a frame whose payload is in one piece."""
    length = memoryview(payload).nbytes
    return encode_header(kind, length, checksum(kind, length, payload)), payload


def verify(header: FrameHeader, total: int) -> None:
    """Raise `PeerError` unless ``total`` is the checksum that the header states."""
    if total != header.checksum:
        raise PeerError(f"a {header.type.name} frame of {header.length} bytes arrived damaged: its checksum is wrong")


def _seed(kind: FrameType, length: int, flags: int) -> int:
    return int.from_bytes(_SEED.pack(length, kind, flags, 0), "little")
