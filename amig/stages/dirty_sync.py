"""Dirty sync: asks round by round what is dirty, plans the extents, and decides when the guest can be moved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np

from amig import bitmap
from amig.errors import NotConverging
from amig.guest import Guest
from amig.memory import PAGE_SIZE, WORD_PAGES, Words
from amig.policy import Convergence, Policy, Verdict
from amig.stages.channel import SendEnd
from amig.stages.delta_choice import DeltaChoice
from amig.stages.items import BLOCK_PAGES, Extent, RoundEnd
from amig.stages.ledger import Ledger
from amig.stages.resumption import Start
from amig.stats import MigrationStats

BLOCK_SECONDS = 0.005
"""After the first round a block is what is carried in so much time, or as much as the wire allows,"""
PAUSED_BLOCKS = 16
"""and the pages that a paused guest waits for go in so many blocks,"""
MIN_BLOCK_PAGES = 256
"""none smaller than this."""
JOINED = 4
"""Extents of zero pages that pass as one, once so many chunks in a row had nothing else."""

Ranges = dict[int, bitmap.Index]
"""By region, rows of (first page, pages, dirty pages)."""


class Observer(Protocol):
    """Who is told how the rounds go."""

    def round_started(self, round_: int, pages: int, *, first_pass: bool) -> None:
        """A round has been planned; ``first_pass``: of memory of which a part was never sent."""

    def round_ended(self, round_: int, pages: int, remaining: int, seconds: float) -> None:
        """All its pages have been taken; ``remaining`` are dirty now."""


class DirtySync:
    """The first stage of the source; its ``run`` is precopy and switchover, as far as memory goes.

    The first round is everything that is not a hole. A sync follows as soon as a round's last extent has been taken,
    while its tail is still being sent. When the rest seems to fit the downtime limit, the pipeline is run dry and the
    sync repeated, so that what counts is what the guest will wait for. When time is up in the middle of a round, the
    round ends there: what was not taken is still pending.
    """

    def __init__(
        self,
        guest: Guest,
        extents: SendEnd[Extent | RoundEnd],
        *,
        policy: Policy,
        convergence: Convergence,
        ledger: Ledger,
        stats: MigrationStats,
        observer: Observer,
        on_pause: Callable[[], None],
        start: Start | None = None,
    ) -> None:
        """``start``: where to go on after a lost connection; None: at the beginning."""
        start = start or Start(began=time.monotonic())
        self._guest = guest
        self._out = extents
        self._policy = policy
        self._convergence = convergence
        self._ledger = ledger
        self._stats = stats
        self._observer = observer
        self._on_pause = on_pause
        self._round = start.round
        self._started = start.began
        self._round_began = time.monotonic()
        self._planned = 0
        self._sparse = start.sparse
        self._known = start.known
        self._paused = False
        self._deltas = DeltaChoice()
        self.state = b""
        """Device and vCPU state, once the run is over."""

    @property
    def sparse(self) -> bool:
        """Whether no round has taken every hole's bit yet."""
        return self._sparse

    async def run(self) -> None:
        """Send all memory until the guest is paused and nothing is left. Raises `NotConverging`."""
        async with self._out:
            await self._emit(await self._sync())
            while True:
                dirty, switch = await self._next()
                if switch:
                    break
                await self._emit(dirty)
            await self._switch_over()

    async def _switch_over(self) -> None:
        self._on_pause()
        await self._guest.pause()
        self._paused = True
        async with asyncio.TaskGroup() as group:
            saving = group.create_task(self._guest.save())  # beside the last pages: the guest waits for both
            await self._emit(await self._sync())
        self.state = saving.result()
        # Saving the state may have dirtied memory (design rule 8); a round of its own, for no page goes twice in one.
        await self._ledger.wait_taken(self._round - 1)
        late = await self._sync()
        if any(bitmap.any_set(words) for words in late.values()):
            await self._emit(late)

    async def _next(self) -> tuple[Mapping[int, Words], bool]:
        """Return what the next round is to send, and whether the guest should be paused for it."""
        last = self._round - 1
        await self._ledger.wait_taken(last)
        dirty = await self._sync()
        verdict = self._judge(dirty, last)
        if verdict is Verdict.SWITCH:
            await self._ledger.wait_placed(last)
            dirty = await self._sync()
            verdict = self._judge(dirty, None)
        if verdict is Verdict.GIVE_UP:
            raise NotConverging(self._why_not(dirty))
        if verdict is Verdict.FORCE:
            await self._ledger.wait_placed(last)
        if verdict is Verdict.GO_ON:  # else the last pages go the way whose rate they were judged by
            self._deltas.round_ended(self._convergence.history[-1])
        return dirty, verdict in (Verdict.SWITCH, Verdict.FORCE)

    def _judge(self, dirty: Mapping[int, Words], ended: int | None) -> Verdict:
        pages = _pages(dirty)
        now = time.monotonic()
        if ended is not None:
            self._convergence.round_took(self._planned * PAGE_SIZE, now - self._round_began)
            self._observer.round_ended(ended, self._planned, pages, now - self._round_began)
        return self._convergence.judge(
            rounds=self._round,
            remaining_bytes=pages * PAGE_SIZE,
            rate=self._rate,
            elapsed=now - self._started,
        )

    @property
    def _rate(self) -> float:
        link = self._stats.link
        return self._convergence.rate(link.memory_per_s, link.gain)

    def _why_not(self, dirty: Mapping[int, Words]) -> str:
        left = _pages(dirty) * PAGE_SIZE
        rate = self._rate
        expected = self._convergence.downtime(left, rate)
        return (
            f"after {self._round} rounds and {time.monotonic() - self._started:.1f} s, {left / 2**20:.0f} MiB are "
            f"still dirty: {expected * 1e3:.0f} ms of downtime at {rate / 1e6:.0f} MB/s, and the limit is "
            f"{self._convergence.limits.downtime * 1e3:.0f} ms. The guest runs on here. Allow more --downtime or "
            "--bandwidth, or use --on-timeout switch"
        )

    async def _sync(self) -> Mapping[int, Words]:
        begin = time.monotonic_ns()
        dirty = await self._guest.sync()
        self._stats.sync_ns += time.monotonic_ns() - begin
        return dirty

    async def _emit(self, dirty: Mapping[int, Words]) -> None:
        sparse = self._sparse  # until one round has taken every hole's bit
        present = {region: self._present(region) for region in dirty} if sparse else {}
        ranges = {region: self._plan(region, words, present.get(region)) for region, words in dirty.items()}
        self._planned = sum(int(rows[:, 2].sum()) for rows in ranges.values())
        block = BLOCK_PAGES if sparse else self._block_pages()
        self._round_began = time.monotonic()
        self._observer.round_started(self._round, self._planned, first_pass=sparse)
        if await self._emit_extents(ranges, present, block):
            self._sparse = False
        await self._out.send(RoundEnd(round=self._round), 0)
        self._round += 1
        self._stats.rounds = self._round

    def _block_pages(self) -> int:
        """Return the most pages of a block: what waits in the pipeline is a number of blocks, and is waited for."""
        pages = int(self._rate * BLOCK_SECONDS) // PAGE_SIZE
        if self._paused:  # the guest waits for the first block to be read, and for the last to be placed
            pages = min(pages, self._planned // PAUSED_BLOCKS)
        return max(MIN_BLOCK_PAGES, min(pages, BLOCK_PAGES))

    async def _emit_extents(self, ranges: Ranges, present: Mapping[int, Words], block: int) -> bool:
        """Put the extents out; returns False when time was up before the last."""
        for region, rows in ranges.items():
            for first, count, pages in self._joined(rows, first_pass=region in present):
                if not self._paused and self._late():
                    return False
                holes = None
                if region in present:
                    holes = ~present[region][first // WORD_PAGES : -(-(first + count) // WORD_PAGES)]
                extent = Extent(
                    round=self._round, region=region, first=first, count=count, dirty=pages, holes=holes,
                    block=block, whole=self._deltas.whole,
                )  # fmt: skip
                await self._out.send(extent, extent.size)
        return True

    def _joined(self, rows: bitmap.Index, *, first_pass: bool) -> Iterator[tuple[int, int, int]]:
        """Yield (first, count, dirty); where nothing but zero pages was met of late, for several extents at once.

        What costs most with zero pages is the way of a chunk through the stages. There is no window to be kept short,
        either; where content begins again, extents of the size asked for do so, too, as soon as it has been seen.
        """
        at = 0
        while at < len(rows):
            many = first_pass and not self._policy.chunk_span and self._stats.empty_chunks >= JOINED
            part = rows[at : at + (JOINED if many else 1)]  # without gaps: in a first pass every page is in an extent
            yield int(part[0, 0]), int(part[:, 1].sum()), int(part[:, 2].sum())
            at += len(part)

    def _late(self) -> bool:
        timeout = self._policy.timeout
        return timeout is not None and time.monotonic() - self._started >= timeout

    def _present(self, region: int) -> Words:
        """Return which pages of a region aren't holes now."""
        pages = self._guest.info.memory.region(region).pages
        present = bitmap.zeros(pages)
        for first, count in self._guest.memory.data_ranges(region, 0, pages):
            bitmap.set_range(present, first, count)
        if region in self._known:
            present |= self._known[region]
        return present

    def _plan(self, region: int, words: Words, present: Words | None) -> bitmap.Index:
        """Cut a region's dirty pages into extents: rows of (first, count, dirty)."""
        pages = self._guest.info.memory.region(region).pages
        limit = self._policy.chunk // PAGE_SIZE
        span = self._policy.chunk_span and self._policy.chunk_span // PAGE_SIZE
        if present is None:
            return hot_last(bitmap.cut(words, 0, limit, span, pages=pages))
        # Holes are planned too, since their bits must be taken (design rule 6), but they cost nothing: an extent
        # reaches to where the next begins.
        rows = bitmap.cut(words & present, 0, limit, span, pages=pages)
        if not len(rows):
            return np.array([[0, pages, 0]], np.int64)
        rows[0, 1] += rows[0, 0]
        rows[0, 0] = 0
        rows[:-1, 1] = np.diff(rows[:, 0])
        rows[-1, 1] = pages - rows[-1, 0]
        assert not (rows[:, 0] % WORD_PAGES).any()  # noqa: S101 - a misplaced clear would lose pages in silence
        return rows


def _pages(dirty: Mapping[int, Words]) -> int:
    return sum(bitmap.count(words) for words in dirty.values())


def hot_last(rows: bitmap.Index) -> bitmap.Index:
    """Return extents with those last that are dirtier for their size, in steps of a factor of two.

    They are written more often, and what goes first has the whole round to be written again.
    """
    heat = np.rint(np.log2(rows[:, 2] / rows[:, 1]))
    return rows[np.argsort(heat, kind="stable")]
