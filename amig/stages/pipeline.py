"""The stages of each side, joined by channels and run as one task group.

::

    source   DirtySync ──Extent──> ClearLog ──Chunk──> Compress ──Block──> Send ══> connections
    dest     connections ══> Receive ──Block──> Decompress ──Block──> Place ──> guest memory
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from amig.digest import PageDigests
from amig.guest import Guest, Incoming
from amig.memory import Region
from amig.policy import Convergence, Policy
from amig.stages.buffers import BufferPool
from amig.stages.channel import ReceiveEnd, SendEnd, channel
from amig.stages.clear_log import ClearLog
from amig.stages.codec_choice import CodecChoice
from amig.stages.compress import Compress
from amig.stages.decompress import Decompress
from amig.stages.delta import SentPages
from amig.stages.dirty_sync import DirtySync, Observer
from amig.stages.items import BLOCK_PAGES, Block, Chunk, Extent, RoundEnd
from amig.stages.ledger import Ledger
from amig.stages.place import Place
from amig.stages.receive import BlockSource, Receive
from amig.stages.resumption import Placement, Start
from amig.stages.send import BlockSink, Send, Throttle
from amig.stats import MigrationStats

BLOCK_BYTES = BLOCK_PAGES * 4096
PLANNED_BYTES = 64 << 20
"""Extents are numbers only: this bounds how far planning runs ahead, in the dirty bytes they stand for."""
QUEUED_BYTES = 4 * BLOCK_BYTES
"""Blocks that were read and wait for a connection, or were received and wait to be placed."""


class SourcePipeline:
    """The four stages of the source."""

    def __init__(
        self,
        guest: Guest,
        sinks: Sequence[BlockSink],
        *,
        policy: Policy,
        convergence: Convergence,
        throttle: Throttle,
        ledger: Ledger,
        stats: MigrationStats,
        observer: Observer,
        on_pause: Callable[[], None],
        digests: PageDigests | None = None,
        sent: SentPages | None = None,
        start: Start | None = None,
    ) -> None:
        """``digests`` takes those of all pages sent; None: nobody wants them.

        ``start``: where to go on after a lost connection, with ``sent``, the delta cache of the pipeline before.
        """
        extents_in: SendEnd[Extent | RoundEnd]
        extents: ReceiveEnd[Extent | RoundEnd]
        chunks_in: SendEnd[Chunk | RoundEnd]
        chunks: ReceiveEnd[Chunk | RoundEnd]
        blocks_in: SendEnd[Block | RoundEnd]
        blocks: ReceiveEnd[Block | RoundEnd]
        extents_in, extents = channel(PLANNED_BYTES)
        chunks_in, chunks = channel(1)  # the shortest queue: one chunk, cleared and waiting to be read
        live = all(sink.live for sink in sinks)
        # A live block is read only when it is sent: one waits while another is on its way, and no more.
        blocks_in, blocks = channel(BLOCK_BYTES if live else QUEUED_BYTES)
        workers = policy.workers or 1
        self._pool = pool = BufferPool(QUEUED_BYTES // BLOCK_BYTES + len(sinks) + 2 * workers + 2)
        choice = CodecChoice(policy.compression, policy.level, workers, stats.link)
        if sent is None and policy.delta_cache:
            sent = SentPages(guest.info.memory.regions, policy.delta_cache)
        self.sent = sent
        self._sync = DirtySync(
            guest,
            extents_in,
            policy=policy,
            convergence=convergence,
            ledger=ledger,
            stats=stats,
            observer=observer,
            on_pause=on_pause,
            start=start,
        )
        self._clear = ClearLog(guest, extents, chunks_in, ledger=ledger, stats=stats)
        self._compress = Compress(
            guest.memory,
            chunks,
            blocks_in,
            pool=pool,
            choice=choice,
            sent=sent,
            workers=workers,
            markers=len(sinks),
            live=live,
            stats=stats,
            digests=digests,
        )
        self._send = Send(blocks, sinks, throttle=throttle, pool=pool, stats=stats)

    @property
    def sparse(self) -> bool:
        """Whether no round has taken every hole's bit yet."""
        return self._sync.sparse

    async def run(self) -> bytes:
        """Send all memory; returns device and vCPU state of the guest, which is paused then."""
        try:
            async with asyncio.TaskGroup() as group:
                for stage in (self._send, self._compress, self._clear, self._sync):
                    group.create_task(stage.run(), name=type(stage).__name__)
        finally:
            self._pool.close()
        return self._sync.state


class DestinationPipeline:
    """The three stages of the destination."""

    def __init__(
        self,
        guest: Incoming,
        regions: Iterable[Region],
        sources: Sequence[BlockSource],
        *,
        workers: int,
        on_round: Callable[[int], Awaitable[None]],
        digests: PageDigests | None = None,
        placement: Placement | None = None,
    ) -> None:
        """``digests`` takes those of all pages placed; None: nobody wants them.

        With a ``placement`` that remembers, a lost connection is no error: what came before it is placed, see `lost`.
        """
        keeps = placement is not None and placement.current is not None
        blocks_in: SendEnd[Block | RoundEnd]
        blocks: ReceiveEnd[Block | RoundEnd]
        pages_in: SendEnd[Block | RoundEnd]
        pages: ReceiveEnd[Block | RoundEnd]
        blocks_in, blocks = channel(QUEUED_BYTES)
        pages_in, pages = channel(2 * BLOCK_BYTES)
        self._pool = pool = BufferPool(QUEUED_BYTES // BLOCK_BYTES + len(sources) + 2 * workers + 4)
        self.place = Place(guest, regions, pages, pool=pool, on_round=on_round, digests=digests, placement=placement)
        self._receive = Receive(sources, blocks_in, pool=pool, landing=self.place, keeps=keeps)
        self._decompress = Decompress(blocks, pages_in, workers=workers)

    @property
    def lost(self) -> str:
        """Why the end came before everything had been received; empty when it did not."""
        return self._receive.lost

    async def run(self) -> None:
        """Receive and place until the first connection says that everything has been sent, or one is `lost`."""
        try:
            async with asyncio.TaskGroup() as group:
                for stage in (self._receive, self._decompress, self.place):
                    group.create_task(stage.run(), name=type(stage).__name__)
        finally:
            self._pool.close()
