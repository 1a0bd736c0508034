"""Compress: reads a chunk's pages, leaves zero pages out, and encodes the rest as blocks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import zstandard

from amig import bitmap
from amig.digest import PageDigests
from amig.memory import PAGE_SIZE, GuestMemory, Pages
from amig.pieces import Pieces
from amig.promptness import be_patient
from amig.stages.buffers import BufferPool
from amig.stages.channel import ReceiveEnd, SendEnd
from amig.stages.codec_choice import SAMPLE_PAGES, CodecChoice
from amig.stages.delta import NOWHERE, Places, SentPages
from amig.stages.items import BLOCK_PAGES, Block, Chunk, Codec, RoundEnd
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
        sent: SentPages | None,
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
        self._sent = sent
        self._workers = workers
        self._markers = markers
        self._live = live
        self._stats = stats
        self._encoding: deque[tuple[Pages, asyncio.Future[tuple[Block, ...]]]] = deque()
        """Blocks on the worker threads, in the order they came, each with the buffer that its pages were copied to."""
        self._threads = ThreadPoolExecutor(workers, "amig-compress", initializer=be_patient)
        self._local = threading.local()
        self._spare: Pages | None = None
        self._sampled: Future[bytes] | None = None

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
                            await self._pass_on(block, whole=item.extent.whole)
                        await self._reserve()
                await self._drain(0)
        finally:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._reader.close()

    async def _reserve(self) -> None:
        # Before the clear, so that the read can follow it at once.
        if self._spare is None:
            self._spare = await self._pool.acquire()

    async def _pass_on(self, block: Block, *, whole: bool) -> None:
        places = self._look_up(block, whole=whole)
        packing = block.data is not None and self._choice.compress()
        if not packing and isinstance(block.data, Pieces) and self._choice.sample():
            self._sample(block.data)
        if places is not None or packing or not self._live:
            block = await self._copy(block)
        if places is not None or packing:
            assert block.buffer is not None  # noqa: S101 - it was copied just now
            encoding = asyncio.get_running_loop().run_in_executor(self._threads, self._encode, block, places, packing)
            self._encoding.append((block.buffer, encoding))
            await self._drain(2 * self._workers - 1)  # with the one that is read meanwhile, two for each worker
        else:
            await self._drain(0)
            await self._out.send(block, block.size)

    def _sample(self, pieces: Pieces) -> None:
        """Have a little of a block compressed on a worker, unless the last sample is still under way."""
        if self._sampled is not None:
            if not self._sampled.done():
                return
            self._sampled.result()
        few = Pieces(pieces.memory, pieces.index[:SAMPLE_PAGES])
        raw = few.copy_to(np.empty((len(few.index), PAGE_SIZE), np.uint8))
        self._sampled = self._threads.submit(self._pack_and_learn, raw)

    def _look_up(self, block: Block, *, whole: bool) -> Places | None:
        """Find the versions of the block's pages that the destination has; None where it will not need them.

        Pages that are to travel ``whole`` are forgotten: nobody knows which version the kernel takes from memory, and
        to remember those that are copied all the same would cost what wholes are to spare.
        """
        sent = self._sent
        if sent is None or not (block.round or sent.roomy):
            return None
        if block.round and block.zero_pages:
            sent.forget(block.region, bitmap.to_pages(block.zero, block.first))
        if not isinstance(block.data, Pieces):
            return None
        if whole:
            sent.forget(block.region, block.data.index)
            return None
        return sent.find(block.region, block.data.index, block.round)

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
        while len(self._encoding) > leave or (self._encoding and self._encoding[0][1].done()):
            buffer, encoding = self._encoding[0]
            blocks = await encoding
            self._encoding.popleft()
            if all(block.buffer is None for block in blocks):  # while encoded ones wait, it serves for the next
                self._pool.release(buffer)
            for block in blocks:
                await self._out.send(block, block.size)

    # on the worker threads

    def _encode(self, block: Block, places: Places | None, packing: bool) -> tuple[Block, ...]:
        """Encode a copied block; what still lies in its buffer says so by holding it, the rest lets go of it."""
        begin = time.monotonic_ns()
        blocks: tuple[Block, ...] = (block,)
        if places is not None:
            blocks = self._differ(block, places)
        if packing and blocks[-1].codec is Codec.RAW:
            blocks = (*blocks[:-1], self._compress(blocks[-1]))
        self._stats.compress_ns += time.monotonic_ns() - begin
        return blocks

    def _differ(self, block: Block, places: Places) -> tuple[Block, ...]:
        """Split a block into what the destination knows an earlier version of, and the rest; remember both."""
        assert self._sent is not None  # noqa: S101 - there are places in it
        pages = np.frombuffer(_copied(block), np.uint8).reshape(-1, PAGE_SIZE)
        known, slots = places.known, places.slots
        news = ~known & (slots != NOWHERE)
        if news.all():
            self._sent.store(slots, pages)
        elif news.any():
            self._sent.store(slots[news], self._rows(pages, news))
        if not known.any():
            return (block,)
        everything = bool(known.all())
        older = pages if everything else self._rows(pages, known)
        packed = self._pack(self._sent.exchange(slots[known], older, self._scratch(1)).reshape(-1).data)
        if len(packed) >= older.nbytes:
            return (block,)  # nothing in common: the pages themselves; they are remembered all the same
        self._stats.pages_delta += len(older)
        data = memoryview(packed)
        if everything:
            return (replace(block, codec=Codec.XOR_ZSTD, data=data, size=len(data), buffer=None),)
        index = bitmap.to_pages(block.pages & ~block.zero, 0)
        words = bitmap.from_pages(index[known], block.span)
        rest = pages[~known]
        return (
            replace(
                block, codec=Codec.XOR_ZSTD, data=data, size=len(data), pages=words, zero=bitmap.zeros(block.span),
                data_pages=len(older), zero_pages=0, buffer=None,
            ),
            replace(
                block, data=rest.reshape(-1).data, size=rest.nbytes, pages=block.pages & ~words, data_pages=len(rest),
                buffer=None,
            ),
        )  # fmt: skip

    def _compress(self, block: Block) -> Block:
        raw = _copied(block)
        packed = self._pack_and_learn(raw)
        if len(packed) >= raw.nbytes:
            return block
        return replace(block, codec=Codec.ZSTD, data=memoryview(packed), size=len(packed), buffer=None)

    def _pack_and_learn(self, raw: memoryview) -> bytes:
        begin = time.monotonic_ns()
        packed = self._pack(raw)
        self._choice.learn(raw=raw.nbytes, packed=len(packed), seconds=(time.monotonic_ns() - begin) / 1e9)
        return packed

    def _pack(self, raw: memoryview) -> bytes:
        compressor = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(level=self._choice.level)
        # Not all at once: room for the worst case would be mapped and faulted in anew for each block.
        stream = compressor.compressobj(size=raw.nbytes)
        return stream.compress(raw) + stream.flush()

    def _rows(self, pages: Pages, which: npt.NDArray[np.bool_]) -> Pages:
        index = np.flatnonzero(which)
        return np.take(pages, index, axis=0, out=self._scratch()[: len(index)], mode="clip")

    def _scratch(self, which: int = 0) -> Pages:
        """Return one of two buffers of this thread: memory made anew each time costs more than what it is for."""
        buffers: list[Pages] | None = getattr(self._local, "buffers", None)
        if buffers is None:
            buffers = self._local.buffers = [np.empty((BLOCK_PAGES, PAGE_SIZE), np.uint8) for _ in range(2)]
        return buffers[which]


def _copied(block: Block) -> memoryview:
    assert isinstance(block.data, memoryview)  # noqa: S101 - only copies come this far
    return block.data
