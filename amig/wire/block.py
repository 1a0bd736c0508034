"""BLOCK: pages of one region, with a bit for each page instead of a header for each page.

::

    u32 round │ u32 region │ u64 first_page │ u32 span_pages │ u8 codec │ u8, u16 reserved, 0
    u32 data_pages │ u32 zero_pages │ u32 data_bytes │ u32 raw_bytes
    page bitmap, ceil(span_pages / 64) u64 words: the pages this block speaks of
    zero bitmap, as many words: those of them that are zero
    data, data_bytes long: the other pages in ascending order, raw, as one zstd frame, or as
one zstd frame of their difference from what was sent before

Bit i of a bitmap is page ``first_page + i``. A sender hands the fixed header, the two bitmaps and the data to the
kernel as they are, joined nowhere; a receiver reads the fixed header, then the bitmaps, then the data straight to where
it wants them.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from amig.errors import PeerError
from amig.memory import PAGE_SIZE, WORD_PAGES, MemoryMap, Words
from amig.wire import limits
from amig.wire.frames import BLOCK_HEADER_SIZE, FrameHeader

if TYPE_CHECKING:
    from typing_extensions import Buffer

_HEADER: Final = struct.Struct("<IIQIBBHIIII")
assert _HEADER.size == BLOCK_HEADER_SIZE  # noqa: S101 - the layout's proof, checked once at import


class Codec(enum.IntEnum):
    """How the data of a block are encoded."""

    RAW = 0
    ZSTD = 1
    XOR_ZSTD = 2
    """One zstd frame of what the pages are to be XORed with where they are placed."""


_CODECS: Final = {int(c): c for c in Codec}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockHeader:
    """The fixed part of a block, each number checked on its own and against the others."""

    round: int
    region: int
    first_page: int
    span_pages: int
    codec: Codec
    data_pages: int
    """Pages with data in this block."""
    zero_pages: int
    data_bytes: int
    """Length of the data as sent."""
    raw_bytes: int
    """Length of the data once decoded: ``data_pages * 4096``."""

    @property
    def bitmap_bytes(self) -> int:
        """Length of each of the two bitmaps."""
        return -(-self.span_pages // WORD_PAGES) * 8

    @property
    def payload_bytes(self) -> int:
        """Length of the whole payload of the frame."""
        return BLOCK_HEADER_SIZE + 2 * self.bitmap_bytes + self.data_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFrame:
    """A block without its data."""

    header: BlockHeader
    pages: Words
    """The pages this block speaks of."""
    zero: Words
    """Those of them that are zero; a subset of ``pages``."""

    @property
    def with_data(self) -> Words:
        """Bitmap of the pages whose content follows."""
        return self.pages & ~self.zero


def describe(
    *,
    round: int,
    region: int,
    first_page: int,
    span_pages: int,
    pages: Words,
    zero: Words,
    codec: Codec = Codec.RAW,
    data_bytes: int | None = None,
) -> BlockFrame:
    """Return a block made from its bitmaps; counts are taken from them, ``data_bytes`` None means raw.

    Raises `ValueError` for one that a receiver would refuse: our own bug.
    """
    present, empty = _number(pages), _number(zero)
    data_pages = (present & ~empty).bit_count()
    raw_bytes = data_pages * PAGE_SIZE
    header = BlockHeader(
        round=round,
        region=region,
        first_page=first_page,
        span_pages=span_pages,
        codec=codec,
        data_pages=data_pages,
        zero_pages=empty.bit_count(),
        data_bytes=raw_bytes if data_bytes is None else data_bytes,
        raw_bytes=raw_bytes,
    )
    wrong = _wrong_numbers(header) or _wrong_bits(header, present, empty)
    if not wrong and (pages.nbytes != header.bitmap_bytes or zero.nbytes != header.bitmap_bytes):
        wrong = f"bitmaps of {pages.nbytes} and {zero.nbytes} bytes for a span of {span_pages} pages"
    if wrong:
        raise ValueError(f"a block that no receiver would take: {wrong}")
    return BlockFrame(header=header, pages=pages, zero=zero)


def encode_header(header: BlockHeader) -> bytes:
    """Return the fixed 40 bytes of a block; to be followed by page bitmap, zero bitmap and data."""
    h = header
    return _HEADER.pack(
        h.round,
        h.region,
        h.first_page,
        h.span_pages,
        h.codec,
        0,
        0,
        h.data_pages,
        h.zero_pages,
        h.data_bytes,
        h.raw_bytes,
    )


def decode_header(data: Buffer, frame: FrameHeader, memory: MemoryMap) -> BlockHeader:
    """Return the fixed part of a block; ``memory`` is the map both sides agreed on at the handshake.

    Raises `PeerError` for anything that no sender may write, before a byte of bitmaps or data is read.
    """
    rnd, region, first, span, number, pad1, pad2, data_pages, zero_pages, data_bytes, raw_bytes = _HEADER.unpack(data)
    codec = _CODECS.get(number)
    if codec is None or pad1 or pad2:
        raise PeerError(f"the peer sent a block with unknown codec {number} or reserved bits set")
    header = BlockHeader(
        round=rnd,
        region=region,
        first_page=first,
        span_pages=span,
        codec=codec,
        data_pages=data_pages,
        zero_pages=zero_pages,
        data_bytes=data_bytes,
        raw_bytes=raw_bytes,
    )
    wrong = _wrong_numbers(header) or _wrong_place(header, memory)
    if not wrong and header.payload_bytes != frame.length:
        wrong = f"its parts make {header.payload_bytes} bytes, the frame has {frame.length}"
    if wrong:
        raise PeerError(f"the peer sent a malformed block: {wrong}")
    return header


def decode_bitmaps(header: BlockHeader, data: Buffer) -> BlockFrame:
    """Return the block whose two bitmaps are ``data`` (kept, not copied).

    Raises `PeerError` unless bitmaps and header agree.
    """
    both = np.frombuffer(memoryview(data), dtype="<u8")
    words = header.bitmap_bytes // 8
    if len(both) != 2 * words:
        raise PeerError(f"the peer sent bitmaps of {len(both)} words for a span of {header.span_pages} pages")
    block = BlockFrame(header=header, pages=both[:words], zero=both[words:])
    wrong = _wrong_bits(header, _number(block.pages), _number(block.zero))
    if wrong:
        raise PeerError(f"the peer sent a malformed block: {wrong}")
    return block


def _wrong_numbers(h: BlockHeader) -> str:
    """Say what is wrong with the numbers of a block on their own; empty when nothing is."""
    if not 0 <= h.round <= limits.MAX_ROUND or not 0 <= h.region <= limits.MAX_REGION_ID:
        return f"round {h.round}, region {h.region}"
    if h.first_page < 0 or h.first_page % WORD_PAGES:
        return f"its first page {h.first_page} is not a multiple of {WORD_PAGES}"
    if not 0 < h.span_pages <= limits.MAX_BLOCK_SPAN:
        return f"a span of {h.span_pages} pages"
    if not 0 <= h.data_pages <= limits.MAX_BLOCK_PAGES or h.data_pages + h.zero_pages == 0:
        return f"{h.data_pages} pages with data and {h.zero_pages} zero pages"
    if h.raw_bytes != h.data_pages * PAGE_SIZE or not 0 <= h.data_bytes <= h.raw_bytes:
        return f"{h.data_pages} pages with data in {h.data_bytes} bytes, {h.raw_bytes} once decoded"
    possible = h.data_bytes == h.raw_bytes if h.codec is Codec.RAW else h.data_bytes > 0
    if not possible or bool(h.data_bytes) != bool(h.data_pages):
        return f"{h.data_bytes} bytes of {h.codec.name} data for {h.data_pages} pages"
    return ""


def _wrong_place(h: BlockHeader, memory: MemoryMap) -> str:
    for region in memory.regions:
        if region.id == h.region:
            if h.first_page + h.span_pages > region.pages:
                return f"pages {h.first_page}+{h.span_pages} leave region {h.region} of {region.pages} pages"
            return ""
    return f"there is no memory region {h.region}"


def _wrong_bits(h: BlockHeader, present: int, empty: int) -> str:
    if present >> h.span_pages:
        return "its bitmap has bits past its span"
    if empty & ~present:
        return "it calls pages zero that it does not speak of"
    counts = present.bit_count() - empty.bit_count(), empty.bit_count()
    if counts != (h.data_pages, h.zero_pages):
        return f"its bitmaps hold {counts[0]} pages with data and {counts[1]} zero pages, its header says otherwise"
    return ""


def _number(words: Words) -> int:
    # One big integer: for up to 64 KiB every set operation and count on it costs microseconds, fewer than numpy does.
    return int.from_bytes(words.data, "little")
