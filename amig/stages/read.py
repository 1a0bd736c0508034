"""Reading a chunk: which of its pages are holes or zero, and the rest as blocks, copied or in place."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from amig import bitmap
from amig.digest import PageDigests
from amig.memory import PAGE_SIZE, GuestMemory, Words
from amig.pieces import Pieces
from amig.stages.gather import block_edges, zero_pages
from amig.stages.items import BLOCK_SPAN, Block, Chunk, Codec, PageIndex
from amig.stages.scan import Scanner
from amig.stats import MigrationStats


class ChunkReader:
    """Turns chunks into blocks whose content is guest memory itself; copying it is the caller's business."""

    def __init__(self, memory: GuestMemory, stats: MigrationStats, digests: PageDigests | None = None) -> None:
        self._memory = memory
        self._stats = stats
        self._digests = digests
        self._scanner = Scanner()

    def close(self) -> None:
        """Let go of what it needed to read. Idempotent."""
        self._scanner.close()

    def blocks(self, chunk: Chunk) -> Iterator[Block]:
        """Yield the chunk's blocks, live; the last one carries the time of the clear."""
        begin = time.monotonic_ns()
        extent, stats = chunk.extent, self._stats
        memory = self._memory.pages(extent.region)
        words = chunk.words if extent.holes is None else self._without_holes(chunk, extent.holes)
        index = bitmap.to_pages(words, extent.first)
        zero = zero_pages(memory, index, self._scanner.all_zero)
        stats.empty_chunks = stats.empty_chunks + 1 if zero.all() else 0
        stats.read_ns += time.monotonic_ns() - begin
        for start, stop in block_edges(index, zero, extent.block):
            # A copy: the chunk's words lie in memory that the host shares, and the next take of this range changes
            # them, which may be before this block is on its way.
            whole = words.copy() if stop - start == len(index) and extent.count <= BLOCK_SPAN else None
            block = self._block(chunk, index[start:stop], zero[start:stop], whole, last=stop == len(index))
            stats.blocks += 1
            stats.pages_sent += block.data_pages
            stats.pages_zero += block.zero_pages
            stats.bytes_memory += block.data_pages * PAGE_SIZE
            yield block
        if not len(index):
            stats.window.record(time.monotonic_ns() - chunk.cleared_ns)

    def _without_holes(self, chunk: Chunk, holes: Words) -> Words:
        # Asked again now, after the clear: a hole that is filled later than this is dirty again (design rule 1). Only
        # of what was a hole: looking for the end of data takes the kernel longer the more of it follows.
        extent = chunk.extent
        still = chunk.words & holes
        if not still.any():
            return chunk.words
        for first, count in zip(*bitmap.runs(still), strict=True):
            for filled, pages in self._memory.data_ranges(extent.region, extent.first + int(first), int(count)):
                bitmap.clear_range(still, filled - extent.first, pages)
        self._stats.pages_holes += bitmap.count(still)
        return chunk.words & ~still

    def _block(
        self, chunk: Chunk, index: PageIndex, empty: npt.NDArray[np.bool_], whole: Words | None, *, last: bool
    ) -> Block:
        """Make the block of the pages in ``index``; ``whole`` are the bits of the extent when that is all of them."""
        region = chunk.extent.region
        if whole is not None:
            first, span, pages = chunk.extent.first, chunk.extent.count, whole
        else:
            first = int(index[0]) & ~63
            span = int(index[-1]) + 1 - first
            pages = bitmap.from_pages(index - first, span)
        empties = int(np.count_nonzero(empty))
        if not empties:
            content, zero = index, bitmap.zeros(span)
        elif empties == len(index):
            content, zero = index[:0], pages
        else:
            content, zero = index[~empty], bitmap.from_pages(index[empty] - first, span)
        if self._digests is not None:
            self._digest(region, content, index[empty])
        return Block(
            round=chunk.extent.round,
            region=region,
            first=first,
            span=span,
            pages=pages,
            zero=zero,
            data_pages=len(content),
            zero_pages=len(index) - len(content),
            codec=Codec.RAW,
            data=Pieces(self._memory.pages(region), content) if len(content) else None,
            size=len(content) * PAGE_SIZE,
            cleared_ns=chunk.cleared_ns if last else 0,
        )

    def _digest(self, region: int, content: PageIndex, zero: PageIndex) -> None:
        # Just before the pages are copied: what the hash has read comes out of the cache then.
        begin = time.monotonic_ns()
        assert self._digests is not None  # noqa: S101 - the caller has asked
        if len(content):
            self._digests.hash(region, self._memory.pages(region), content)
        if len(zero):
            self._digests.zero(region, zero)
        self._stats.digest_ns += time.monotonic_ns() - begin
