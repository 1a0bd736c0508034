"""Compress: reads a chunk's pages, leaves zero pages out, and encodes the rest as blocks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import zstandard

from amig.digest import PageDigests
from amig.memory import GuestMemory, Pages
from amig.pieces import Pieces
from amig.stages.buffers import BufferPool
from amig.stages.channel import ReceiveEnd, SendEnd
from amig.stages.codec_choice import CodecChoice
from amig.stages.items import Block, Chunk, Codec, RoundEnd
from amig.stages.read import ChunkReader
from amig.stats import MigrationStats


class Compress:
    """The third stage of the source, and the one that reads guest memory.

    What is not compressed passes as it lies in guest memory, where the connections can take it from there (``live``):
    the kernel's own copy is then the read. Everything else is copied into a buffer first, on the event loop (0.1 ms for
    a block: less than a thread costs), which closes the window; compression works on the copy in worker threads, and
    blocks leave in the order they came.
    """

    def __init__(
        self,
        memory: GuestMemory,
        chunks: ReceiveEnd[Chunk | RoundEnd],
        blocks: SendEnd[Block | RoundEnd],
        *,
        pool: BufferPool,
        choice: CodecChoice,
        workers: int,
        markers: int,
        live: bool,
        stats: MigrationStats,
        digests: PageDigests | None = None,
    ) -> None:
        """``markers`` copies of every `RoundEnd` are passed on: one for each connection."""
        self._reader = ChunkReader(memory, stats, digests)
        self._in = chunks
        self._out = blocks
        self._pool = pool
        self._choice = choice
        self._workers = workers
        self._markers = markers
        self._live = live
        self._stats = stats
        self._encoding: deque[asyncio.Future[Block]] = deque()
        self._threads = ThreadPoolExecutor(workers, "amig-compress")
        self._local = threading.local()
        self._spare: Pages | None = None

    async def run(self) -> None:
        """Turn chunks into blocks until the input ends. When cancelled, waits for its threads first."""
        try:
            async with self._out:
                await self._reserve()
                async for item in self._in:
                    if isinstance(item, RoundEnd):
                        await self._drain(0)
                        for _ in range(self._markers):
                            await self._out.send(item, 0)
                    else:
                        for block in self._reader.blocks(item):
                            await self._pass_on(block)
                        await self._reserve()
                await self._drain(0)
        finally:
            self._threads.shutdown(wait=True, cancel_futures=True)

    async def _reserve(self) -> None:
        # Before the clear, so that the read can follow it at once.
        if self._spare is None:
            self._spare = await self._pool.acquire()

    async def _pass_on(self, block: Block) -> None:
        packing = block.data is not None and self._choice.compress()
        if packing or not self._live:
            block = await self._copy(block)
        if packing:
            loop = asyncio.get_running_loop()
            self._encoding.append(loop.run_in_executor(self._threads, self._compress, block))
            await self._drain(2 * self._workers)
        else:
            await self._drain(0)
            await self._out.send(block, block.size)

    async def _copy(self, block: Block) -> Block:
        buffer = self._spare if self._spare is not None else await self._pool.acquire()
        self._spare = None
        begin = time.monotonic_ns()
        data = block.data.copy_to(buffer) if isinstance(block.data, Pieces) else None
        now = time.monotonic_ns()
        self._stats.read_ns += now - begin
        if block.cleared_ns:
            self._stats.window.record(now - block.cleared_ns)
        return replace(block, data=data, buffer=buffer, cleared_ns=0)

    async def _drain(self, leave: int) -> None:
        while len(self._encoding) > leave or (self._encoding and self._encoding[0].done()):
            block = await self._encoding[0]
            self._encoding.popleft()
            await self._out.send(block, block.size)

    def _compress(self, block: Block) -> Block:
        begin = time.monotonic_ns()
        compressor = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(level=self._choice.level)
        raw = block.data
        assert isinstance(raw, memoryview)  # noqa: S101 - it was copied
        packed = compressor.compress(raw)
        took = time.monotonic_ns() - begin
        self._choice.learn(raw=raw.nbytes, packed=len(packed), seconds=took / 1e9)
        self._stats.compress_ns += took
        if len(packed) >= raw.nbytes:
            return block
        return replace(block, codec=Codec.ZSTD, data=memoryview(packed), size=len(packed))
