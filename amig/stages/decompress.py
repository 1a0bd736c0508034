"""Decompress: turns blocks back into pages, in worker threads, without changing their order."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import zstandard

from amig.errors import PeerError
from amig.memory import PAGE_SIZE
from amig.promptness import be_patient
from amig.stages.channel import ReceiveEnd, SendEnd
from amig.stages.items import Block, Codec, RoundEnd


class Decompress:
    """The second stage of the destination. Raw blocks pass as they are."""

    def __init__(
        self,
        blocks: ReceiveEnd[Block | RoundEnd],
        pages: SendEnd[Block | RoundEnd],
        *,
        workers: int,
    ) -> None:
        self._in = blocks
        self._out = pages
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers, "amig-decompress", initializer=be_patient)
        self._local = threading.local()
        self._work: deque[asyncio.Future[Block] | Block] = deque()

    async def run(self) -> None:
        """Decode until the input ends. Raises `PeerError` for content that is not what its header says."""
        try:
            async with self._out:
                async for item in self._in:
                    if isinstance(item, RoundEnd):
                        await self._drain(0)
                        await self._out.send(item, 0)
                        continue
                    if item.codec is not Codec.RAW:
                        loop = asyncio.get_running_loop()
                        self._work.append(loop.run_in_executor(self._threads, self._decompress, item))
                        await self._drain(2 * self._workers)
                    else:
                        self._work.append(item)
                        await self._drain(0)
                await self._drain(0)
        finally:
            for work in self._work:
                if not isinstance(work, Block) and not work.cancel() and not work.cancelled():
                    work.exception()  # seen: nobody waits for it any more
            self._threads.shutdown(wait=True, cancel_futures=True)

    async def _drain(self, leave: int) -> None:
        while len(self._work) > leave:
            work = self._work[0]
            block = work if isinstance(work, Block) else await work
            self._work.popleft()
            await self._out.send(block, block.size)

    def _decompress(self, block: Block) -> Block:
        decompressor = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor()
        expected = block.data_pages * PAGE_SIZE
        packed = block.data
        assert isinstance(packed, memoryview)  # noqa: S101 - it came from a connection
        try:
            # Checked before anything is allocated: a few bytes may claim to hold gigabytes.
            if zstandard.frame_content_size(packed) != expected:
                raise PeerError("a compressed block does not state the size that its pages have")
            raw = decompressor.decompress(packed, max_output_size=expected)
        except zstandard.ZstdError as error:
            raise PeerError(f"a compressed block can't be decompressed: {error}") from error
        if len(raw) != expected:
            raise PeerError(f"a compressed block held {len(raw)} bytes instead of {expected}")
        codec = Codec.XOR if block.codec is Codec.XOR_ZSTD else Codec.RAW
        return replace(block, codec=codec, data=memoryview(raw), size=expected)
