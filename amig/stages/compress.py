"""Compress: reads a chunk's pages, leaves zero pages out, and encodes the rest as blocks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import zstandard

from amig import bitmap
from amig.memory import PAGE_SIZE, GuestMemory, Pages, Words
from amig.stages.buffers import BufferPool
from amig.stages.channel import ReceiveEnd, SendEnd
from amig.stages.codec_choice import CodecChoice
from amig.stages.gather import block_edges, copy_pages, zero_pages
from amig.stages.items import Block, Chunk, Codec, PageIndex, RoundEnd
from amig.stats import MigrationStats


class Compress:
    """The third stage of the source, and the only one that reads guest memory.

    Pages are copied into a buffer on the event loop (0.15 ms for a block: less than a thread costs), which closes the
    window; compression then works on the copy in worker threads, and blocks leave in the order they came.
    """

    def __init__(
        self,
        memory: GuestMemory,
        chunks: ReceiveEnd[Chunk | RoundEnd],
        blocks: SendEnd[tuple[Block, Pages] | RoundEnd],
        *,
        pool: BufferPool,
        choice: CodecChoice,
        workers: int,
        markers: int,
        stats: MigrationStats,
    ) -> None:
        """``markers`` copies of every `RoundEnd` are passed on: one for each connection."""
        self._memory = memory
        self._in = chunks
        self._out = blocks
        self._pool = pool
        self._choice = choice
        self._workers = workers
        self._markers = markers
        self._stats = stats
        self._encoding: deque[asyncio.Future[tuple[Block, Pages]]] = deque()
        self._threads = ThreadPoolExecutor(workers, "amig-compress")
        self._local = threading.local()
        self._spare: Pages | None = None

    async def run(self) -> None:
        """Turn chunks into blocks until the input ends. When cancelled, waits for its threads first."""
        try:
            async with self._out:
                self._spare = await self._pool.acquire()  # before the clear, so that the read can follow it at once
                async for item in self._in:
                    if isinstance(item, RoundEnd):
                        await self._drain(0)
                        for _ in range(self._markers):
                            await self._out.send(item, 0)
                    else:
                        await self._read(item)
                        if self._spare is None:
                            self._spare = await self._pool.acquire()
                await self._drain(0)
        finally:
            self._threads.shutdown(wait=True, cancel_futures=True)

    async def _read(self, chunk: Chunk) -> None:
        extent = chunk.extent
        memory = self._memory.pages(extent.region)
        begin = time.monotonic_ns()
        words = chunk.words if extent.holes is None else self._without_holes(chunk, extent.holes)
        index = bitmap.to_pages(words, extent.first)
        zero = zero_pages(memory, index)
        read_ns = time.monotonic_ns() - begin
        for start, stop in block_edges(index, zero):
            buffer = self._spare if self._spare is not None else await self._pool.acquire()
            self._spare = None
            begin = time.monotonic_ns()
            content = index[start:stop][~zero[start:stop]]
            data = copy_pages(memory, content, buffer)
            read_ns += time.monotonic_ns() - begin
            block = _block(chunk, index[start:stop], content, data)
            await self._encode(block, buffer)
        self._stats.read_ns += read_ns
        self._stats.window.record(time.monotonic_ns() - chunk.cleared_ns)

    def _without_holes(self, chunk: Chunk, holes: Words) -> Words:
        # Asked again now, after the clear: a hole that is filled later than this is dirty again (design rule 1). Only
        # of what was a hole: looking for the end of data takes the kernel longer the more of it follows.
        extent = chunk.extent
        still = chunk.words & holes
        for first, count in zip(*bitmap.runs(still), strict=True):
            for filled, pages in self._memory.data_ranges(extent.region, extent.first + int(first), int(count)):
                bitmap.clear_range(still, filled - extent.first, pages)
        self._stats.pages_holes += bitmap.count(still)
        return chunk.words & ~still

    async def _encode(self, block: Block, buffer: Pages) -> None:
        stats = self._stats
        stats.blocks += 1
        stats.pages_sent += block.data_pages
        stats.pages_zero += block.zero_pages
        stats.bytes_memory += block.data_pages * PAGE_SIZE
        loop = asyncio.get_running_loop()
        if block.data_pages and self._choice.compress():
            self._encoding.append(loop.run_in_executor(self._threads, self._compress, block, buffer))
        elif self._encoding:
            done: asyncio.Future[tuple[Block, Pages]] = loop.create_future()
            done.set_result((block, buffer))
            self._encoding.append(done)
        else:
            await self._out.send((block, buffer), block.data.nbytes)
            return
        await self._drain(2 * self._workers)

    async def _drain(self, leave: int) -> None:
        while len(self._encoding) > leave or (self._encoding and self._encoding[0].done()):
            block, buffer = await self._encoding[0]
            self._encoding.popleft()
            await self._out.send((block, buffer), block.data.nbytes)

    def _compress(self, block: Block, buffer: Pages) -> tuple[Block, Pages]:
        begin = time.monotonic_ns()
        compressor = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(level=self._choice.level)
        packed = compressor.compress(block.data)
        took = time.monotonic_ns() - begin
        self._choice.learn(raw=block.data.nbytes, packed=len(packed), seconds=took / 1e9)
        self._stats.compress_ns += took
        if len(packed) >= block.data.nbytes:
            return block, buffer
        return (
            Block(
                round=block.round,
                region=block.region,
                first=block.first,
                span=block.span,
                pages=block.pages,
                zero=block.zero,
                data_pages=block.data_pages,
                zero_pages=block.zero_pages,
                codec=Codec.ZSTD,
                data=memoryview(packed),
            ),
            buffer,
        )


def _block(chunk: Chunk, index: PageIndex, content: PageIndex, data: Pages) -> Block:
    first = int(index[0]) & ~63
    span = int(index[-1]) + 1 - first
    pages = bitmap.from_pages(index - first, span)
    zero = pages.copy()
    if len(content) == len(index):
        zero[:] = 0
    elif len(content):
        zero &= ~bitmap.from_pages(content - first, span)
    return Block(
        round=chunk.extent.round,
        region=chunk.extent.region,
        first=first,
        span=span,
        pages=pages,
        zero=zero,
        data_pages=len(content),
        zero_pages=len(index) - len(content),
        codec=Codec.RAW,
        data=data.reshape(-1).data,
    )
