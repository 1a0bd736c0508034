"""What flows between the stages: extents, chunks, blocks, and the mark at the end of a round.

An *extent* is planned, a *chunk* is an extent whose bits were taken and cleared, a *block* is (a part of) a chunk's
pages as encoded for the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from amig.memory import PAGE_SIZE, Pages, Words
from amig.pieces import Pieces

BLOCK_PAGES = 1024
"""Most pages of content in a block: 4 MiB."""
BLOCK_SPAN = 1 << 19
"""A block lies within one range of so many pages that starts at a multiple of it, so its bitmaps stay within 64 KiB."""

PageIndex = npt.NDArray[np.int64]
"""Page numbers within a region, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A 64-aligned range of a region that is to be cleared and read as one chunk."""

    round: int
    region: int
    first: int
    count: int
    dirty: int
    """Pages known to be dirty in it when it was planned; a take may find more."""
    holes: Words | None = None
    """Pages that were holes when it was planned; those that still are after the clear need no reading. None: none."""

    block: int = BLOCK_PAGES
    """Most pages of content in a block of it."""
    whole: bool = False
    """Whether its pages are to travel as wholes even where a difference would do."""

    @property
    def size(self) -> int:
        """Dirty bytes."""
        return self.dirty * PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """An extent whose pending bits are now ours and cleared in the kernel: its pages may be read."""

    extent: Extent
    words: Words
    """The bits taken."""
    cleared_ns: int
    """Monotonic time at which the clear began."""


class Codec(IntEnum):
    """How a block's content is encoded."""

    RAW = 0
    ZSTD = 1
    XOR_ZSTD = 2
    """What is different from the version that the destination has, compressed."""
    XOR = 3
    """The same, decompressed: never on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Pages of one region as they travel."""

    round: int
    region: int
    first: int
    """Page that bit 0 of the bitmaps stands for; a multiple of 64."""
    span: int
    """Pages the bitmaps cover."""
    pages: Words
    """Pages in this block, zero or not."""
    zero: Words
    """Those of them that are zero: no content travels."""
    data_pages: int
    zero_pages: int
    codec: Codec
    data: memoryview | Pieces | None
    """Content of the non-zero pages in ascending order: encoded; or where it lies in guest memory, where it may still
    change, and who copies it out closes the window. None when there is none, or it has landed in guest memory."""
    size: int
    """Bytes in ``data``."""
    buffer: Pages | None = None
    """The pool's buffer that ``data`` lies in, to be released when it has been used."""
    index: PageIndex | None = None
    """Pages with content, ascending, where somebody has worked that out."""
    cleared_ns: int = 0
    """On the last block of a chunk as long as it is not copied: when the chunk's clear began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEnd:
    """Everything of a round has passed."""

    round: int
