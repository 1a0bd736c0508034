"""The two pipelines, joined in memory: what arrives is what the guest had, however it writes meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from amig import bitmap
from amig.errors import NotConverging
from amig.guest import RunState
from amig.memory import PAGE_SIZE, Pages
from amig.policy import Convergence, Limits, Policy
from amig.stages.buffers import BufferPool
from amig.stages.compress import Compress
from amig.stages.delta_choice import PATIENCE, TRIAL
from amig.stages.dirty_sync import MIN_BLOCK_PAGES, hot_last
from amig.stages.items import BLOCK_PAGES, Block, Codec
from amig.stages.ledger import Ledger
from amig.stages.pipeline import DestinationPipeline, SourcePipeline
from amig.stats import MigrationStats
from tests.modelguest import MemoryLink, ModelGuest, ModelIncoming, Unthrottled

PAGES = 3000
MANY_ROUNDS = Policy(downtime=1e-6, max_rounds=5, on_timeout="switch")
"""Never converges while the guest writes, so there are five rounds before the last."""


@dataclass
class Rounds:
    """An `Observer` that remembers, and lets a test act at the start of a round."""

    planned: list[int] = field(default_factory=list)
    on_start: Callable[[int], None] = lambda _: None

    def round_started(self, round_: int, pages: int, *, first_pass: bool) -> None:
        self.planned.append(pages)
        self.on_start(round_)

    def round_ended(self, round_: int, pages: int, remaining: int, seconds: float) -> None:
        pass


@dataclass
class Run:
    """Everything one migration in memory consists of."""

    guest: ModelGuest
    incoming: ModelIncoming
    links: list[MemoryLink]
    stats: MigrationStats
    rounds: Rounds
    placed: list[int] = field(default_factory=list)
    state: bytes = b""

    def assert_equal(self) -> None:
        assert self.incoming.array is not None
        wrong = np.flatnonzero((self.guest.array.arrays[0] != self.incoming.array.arrays[0]).any(axis=1))
        assert not len(wrong), f"pages that differ: {wrong[:20].tolist()} ({len(wrong)} in all)"


async def migrate(
    guest: ModelGuest,
    policy: Policy,
    *,
    rounds: Rounds | None = None,
    links: list[MemoryLink] | None = None,
) -> Run:
    links = links or [MemoryLink() for _ in range(policy.streams or 1)]
    run = Run(guest, ModelIncoming(guest.array.map), links, MigrationStats(), rounds or Rounds())
    ledger = Ledger(guest.array.map.regions)
    await guest.log_start(policy.dirty_log)
    source = SourcePipeline(
        guest,
        run.links,
        policy=policy,
        convergence=Convergence(policy=policy, limits=Limits.of(policy)),
        throttle=Unthrottled(),
        ledger=ledger,
        stats=run.stats,
        observer=run.rounds,
        on_pause=lambda: None,
    )

    async def on_round(round_: int) -> None:
        run.placed.append(round_)
        ledger.placed(round_)

    destination = DestinationPipeline(
        run.incoming, guest.array.map.regions, run.links, workers=policy.workers or 1, on_round=on_round
    )

    async def send() -> None:
        run.state = await source.run()
        await run.links[0].queue.put(None)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(destination.run())
        group.create_task(send())
    await guest.log_stop()
    return run


def busy(guest: ModelGuest, pages: int, rounds: int) -> Rounds:
    """The guest writes while its first rounds are sent: at their start, and between and after takes."""
    left = [rounds * 20]

    def write() -> None:
        if left[0] > 0 and guest.state is RunState.RUNNING:
            left[0] -= 1
            guest.write(guest.random.integers(0, PAGES, pages))

    guest.before_take = write
    guest.after_take = write
    return Rounds(on_start=lambda _: write())


@pytest.mark.parametrize("live", [True, False], ids=["live", "copied"])
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("compression", ["none", "zstd", "auto"])
@pytest.mark.parametrize("strategy", ["slot-cache", "auto-clear", "exact"])
async def test_a_guest_that_writes_all_the_time_arrives_whole(
    strategy: str, compression: str, streams: int, live: bool
) -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(0, PAGES, 2))
    guest.write(np.arange(0, 100), zero=True)
    policy = Policy(
        chunk=1 << 18, streams=streams, compression=compression, workers=2, dirty_log=strategy, downtime=0.005
    )  # type: ignore[arg-type]
    links = [MemoryLink(live=live) for _ in range(streams)]
    run = await migrate(guest, policy, rounds=busy(guest, 40, 3), links=links)
    run.assert_equal()
    assert run.state == b"state"
    assert run.placed == list(range(run.stats.rounds))
    assert run.stats.pages_resent > 0


@pytest.mark.parametrize("cache", [PAGES * PAGE_SIZE, 200 * PAGE_SIZE], ids=["all-memory", "too-small"])
@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_differences_bring_the_same_memory(compression: str, streams: int, cache: int) -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(0, PAGES, 2))
    policy = Policy(  # six rounds whatever the pace: a downtime that nothing fits
        chunk=1 << 18, streams=streams, compression=compression, workers=2, delta_cache=cache,
        downtime=1e-6, max_rounds=6, on_timeout="switch",
    )  # type: ignore[arg-type]  # fmt: skip
    rounds = busy(guest, 40, 3)
    write = rounds.on_start

    def start(round_: int) -> None:
        write(round_)
        if guest.state is RunState.RUNNING:  # a page that was zero in between has no version to differ from
            guest.write(np.arange(0, 60, 2), zero=bool(round_ % 2))

    rounds.on_start = start
    links = [MemoryLink() for _ in range(streams)]
    run = await migrate(guest, policy, rounds=rounds, links=links)
    run.assert_equal()
    assert run.stats.pages_delta > 0
    assert any(block.codec is Codec.XOR_ZSTD for link in links for block in link.blocks)


async def stuck(rounds: int) -> tuple[Run, dict[int, set[Codec]]]:
    """Move a guest with a delta cache that leaves as much as ever after each round; returns each round's codecs."""
    guest = ModelGuest(PAGES)
    guest.write(np.arange(0, PAGES, 2))
    policy = Policy(chunk=1 << 18, delta_cache=PAGES * PAGE_SIZE, downtime=1e-6, max_rounds=rounds, on_timeout="switch")
    link = MemoryLink(live=True)

    def write(round_: int) -> None:
        if guest.state is RunState.RUNNING:
            guest.write(np.arange(0, 200, 2) + 1024 * (round_ % 2))

    def start(round_: int) -> None:
        write(round_)
        guest.after_take = (lambda: write(0)) if not round_ else lambda: None

    run = await migrate(guest, policy, rounds=Rounds(on_start=start), links=[link])
    coded = {round_: set[Codec]() for round_ in range(run.stats.rounds)}
    for block in link.blocks:
        coded[block.round].add(block.codec)
    return run, coded


async def test_where_differences_get_nowhere_wholes_go_and_no_later_difference_is_from_an_older_version() -> None:
    """Of a page that the kernel took as a whole no version is known: the next difference must not use one."""
    rounds = PATIENCE + TRIAL + 6
    run, coded = await stuck(rounds)
    run.assert_equal()
    turn = next(round_ for round_ in coded if round_ and coded[round_] == {Codec.RAW})
    assert turn == 1 + PATIENCE
    assert all(coded[round_] == {Codec.XOR_ZSTD} for round_ in range(2, turn)), "differences until then"
    assert all(coded[round_] == {Codec.RAW} for round_ in range(turn, turn + TRIAL))
    assert any(Codec.XOR_ZSTD in coded[round_] for round_ in range(turn + TRIAL, rounds)), "and again afterwards"


async def test_the_last_pages_go_the_way_whose_rate_they_were_judged_by() -> None:
    """Else the paused guest would wait for a way that nobody has tried."""
    run, coded = await stuck(1 + PATIENCE)
    run.assert_equal()
    assert coded[run.stats.rounds - 1] == {Codec.XOR_ZSTD}


def left_by_the_first_round(guest: ModelGuest, pages: np.ndarray) -> Rounds:
    """The guest writes these pages while the first round is taken, so that they are dirty at its end; nothing later."""

    def start(round_: int) -> None:
        guest.after_take = (lambda: guest.write(pages)) if not round_ else lambda: None

    return Rounds(on_start=start)


async def test_what_is_written_most_goes_last_for_it_has_the_least_time_to_be_written_again() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    hot, cold = np.arange(256), np.arange(256, PAGES, 16)
    link = MemoryLink()
    rounds = left_by_the_first_round(guest, np.concatenate([hot, cold]))
    policy = Policy(chunk=1 << 18, downtime=1e-6, max_rounds=2, on_timeout="switch")
    run = await migrate(guest, policy, rounds=rounds, links=[link])
    run.assert_equal()
    first = [block.first for block in link.blocks if block.round == 1]
    assert first[-4:] == [0, 64, 128, 192]
    assert first[:-4] == sorted(first[:-4]), "of equals, in the order of memory"


def test_what_is_about_as_hot_stays_in_the_order_of_memory() -> None:
    """In steps of a factor of two: what lies side by side is read side by side."""
    rows = np.array([[first, 1024, 512 + first % 200] for first in range(0, 1024 * 50, 1024)], np.int64)
    hot = np.array([[64, 64, 64]], np.int64)
    assert hot_last(np.concatenate((hot, rows))).tolist() == [*rows.tolist(), *hot.tolist()]
    assert hot_last(rows[:0]).shape == (0, 3)


@pytest.mark.parametrize(("bandwidth", "most"), [(1e6, MIN_BLOCK_PAGES), (None, BLOCK_PAGES)], ids=["slow", "fast"])
async def test_on_a_slow_link_blocks_are_small_after_the_first_round_for_their_end_is_waited_for(
    bandwidth: float | None, most: int
) -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    link = MemoryLink()
    rounds = left_by_the_first_round(guest, np.arange(PAGES))
    policy = Policy(chunk=4 << 20, bandwidth=bandwidth, downtime=1e-6, max_rounds=2, on_timeout="switch")
    run = await migrate(guest, policy, rounds=rounds, links=[link])
    run.assert_equal()
    largest = [max(block.data_pages for block in link.blocks if block.round == round_) for round_ in (0, 1)]
    assert largest == [BLOCK_PAGES, most]


async def test_a_cap_on_the_link_is_reckoned_with_in_the_memory_that_it_stands_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What compresses well moves more memory than the operator allows bytes on the link."""
    gains: list[float] = []
    rate = Convergence.rate

    def noted(self: Convergence, link: float, gain: float = 1.0) -> float:
        gains.append(gain)
        return rate(self, link, gain)

    monkeypatch.setattr(Convergence, "rate", noted)
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    (await migrate(guest, Policy(compression="zstd", bandwidth=1e6))).assert_equal()
    assert gains[-1] > 10


@pytest.mark.parametrize("stalled", [0, 1], ids=["compressed", "differences"])
async def test_what_waits_for_a_slow_link_waits_packed_and_holds_no_buffer(stalled: int) -> None:
    """All of a round is read and packed while the link stands still, which is more than there are buffers for."""
    pages, chunks = 16 * BLOCK_PAGES, 16
    guest = ModelGuest(pages)
    guest.write(np.arange(pages))
    taken = now = 0
    all_taken = asyncio.Event()

    class Stalled(MemoryLink):
        async def send_block(self, block: Block) -> int:
            if block.round == stalled:
                await all_taken.wait()
            return await super().send_block(block)

    def start(round_: int) -> None:
        nonlocal now
        now = round_

    def count() -> None:
        nonlocal taken
        taken += now == stalled
        if taken == chunks:
            all_taken.set()
        if now < stalled:  # once more, in the round that the link will not carry
            guest.write(np.arange(pages))

    guest.after_take = count
    policy = Policy(
        chunk=pages // chunks * PAGE_SIZE, compression="zstd", delta_cache=stalled * pages * PAGE_SIZE,
        downtime=1e-6, max_rounds=2, on_timeout="switch",
    )  # fmt: skip
    run = await migrate(guest, policy, rounds=Rounds(on_start=start), links=[Stalled(live=False)])
    run.assert_equal()
    assert run.stats.pages_delta == stalled * pages


@pytest.mark.parametrize(("workers", "most"), [(1, 2), (2, 4)])
async def test_compression_holds_two_buffers_for_each_worker_however_slow_it_is(
    workers: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is packed and one is read, or waits: the most of what a migration needs beside the guest's memory."""
    held: dict[int, int] = {}
    acquire, pack = BufferPool.acquire, Compress._pack

    def slowly(self: Compress, raw: memoryview) -> bytes:
        time.sleep(0.01)
        return pack(self, raw)

    async def noted(self: BufferPool) -> Pages:
        buffer = await acquire(self)
        held[self.count] = max(held.get(self.count, 0), self.count - self.free)
        return buffer

    monkeypatch.setattr(BufferPool, "acquire", noted)
    monkeypatch.setattr(Compress, "_pack", slowly)
    guest = ModelGuest(16 * BLOCK_PAGES)
    guest.write(np.arange(16 * BLOCK_PAGES))
    (await migrate(guest, Policy(compression="zstd", workers=workers))).assert_equal()
    assert held[min(held)] == most, "the source's pool is the smaller one"


async def test_holes_are_never_sent_and_count_as_zero_pages() -> None:
    guest = ModelGuest(PAGES)
    guest.write([5, 700, 701])
    run = await migrate(guest, Policy())
    run.assert_equal()
    assert run.stats.pages_sent == 3
    assert run.stats.pages_holes == PAGES - 3
    assert sum(bitmap.count(b.pages) for b in run.links[0].blocks) == 3


SMALL_CHUNKS = 1 << 18  # 64 pages


def zeros_then_content() -> ModelGuest:
    """A guest that has touched all of its memory and left most of it zero; the last part has content."""
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES), zero=True)
    guest.write(np.arange(PAGES - 1600, PAGES))
    return guest


def sizes(guest: ModelGuest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pages of each extent taken, as they will be."""
    taken: list[int] = []
    take = ModelGuest.take_and_clear

    async def counting(self: ModelGuest, region: int, first: int, count: int) -> bitmap.Words:
        taken.append(count)
        return await take(self, region, first, count)

    monkeypatch.setattr(ModelGuest, "take_and_clear", counting)
    return taken


@pytest.fixture
def planned_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning does not run ahead of what is read: so small a guest would be planned before its first page is."""
    monkeypatch.setattr("amig.stages.pipeline.PLANNED_BYTES", 1)


@pytest.mark.usefixtures("planned_late")
async def test_zero_pages_pass_in_larger_extents_until_content_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = zeros_then_content()
    taken = sizes(guest, monkeypatch)
    (await migrate(guest, Policy(chunk=SMALL_CHUNKS))).assert_equal()
    assert sum(taken[: taken.index(256)]) <= 10 * 64  # soon
    assert len(taken) < PAGES // 64  # and all in all fewer
    assert sum(taken) == PAGES  # each page once, in the first pass
    assert taken[-5:] == [64] * 4 + [PAGES % 64]  # the window of content is as short as ever


async def test_what_a_paused_guest_waits_for_goes_in_small_blocks() -> None:
    """The link is not idle until all of it has been read, nor the destination until all of it has come."""
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    guest.after_take = lambda: guest.write(np.arange(1500)) if guest.state is RunState.RUNNING else None
    run = await migrate(guest, Policy(downtime=1e-6, max_rounds=2, on_timeout="switch"))
    run.assert_equal()
    blocks = run.links[0].blocks
    assert max(block.data_pages for block in blocks if block.round == 0) == 1024
    final = max(block.round for block in blocks)
    last = [block.data_pages for block in blocks if block.round == final]
    assert final > 0
    assert sum(last) == 1500
    assert max(last) == 256


@pytest.mark.usefixtures("planned_late")
async def test_extents_of_a_fixed_span_stay_as_they_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = zeros_then_content()
    taken = sizes(guest, monkeypatch)
    (await migrate(guest, Policy(chunk=SMALL_CHUNKS, chunk_span=SMALL_CHUNKS))).assert_equal()
    assert max(taken) == 64


@pytest.mark.usefixtures("planned_late")
async def test_a_page_written_between_zero_pages_that_passed_as_one_is_sent_again() -> None:
    guest = zeros_then_content()
    late = iter(range(PAGES - 1700, 0, -37))

    def write() -> None:
        if guest.state is RunState.RUNNING and (page := next(late, None)) is not None:
            guest.write([page])

    guest.after_take = write
    (await migrate(guest, Policy(chunk=SMALL_CHUNKS))).assert_equal()


async def test_memory_backed_in_vain_is_given_back_before_the_second_round() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(0, PAGES // 4))  # in a row: more is likely to follow, but only zeros do
    guest.write(np.arange(PAGES // 4, PAGES), zero=True)
    run = await migrate(guest, Policy(chunk=1 << 18))
    run.assert_equal()
    assert run.incoming.backed <= set(range(PAGES // 4))


async def test_a_hole_filled_while_the_first_round_runs_is_sent() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(64))
    filled = iter([2000])

    def fill() -> None:
        for page in filled:
            guest.write([page])

    guest.after_take = fill
    (await migrate(guest, Policy())).assert_equal()


async def test_a_page_that_becomes_zero_again_is_zero_at_the_destination() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(500))
    wiped = iter([np.arange(100, 200)])

    def wipe() -> None:
        for pages in wiped:
            guest.write(pages, zero=True)

    guest.after_take = lambda: guest.write([1000]) if len(rounds.planned) == 1 else wipe()
    rounds = Rounds()
    run = await migrate(guest, MANY_ROUNDS, rounds=rounds)
    run.assert_equal()
    assert not run.incoming.pages(0)[100:200].any()


async def test_memory_written_by_saving_the_state_is_sent_too() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    guest.on_save = lambda: guest.write([17, 18])
    run = await migrate(guest, Policy())
    run.assert_equal()
    assert run.rounds.planned[-1] == 2


async def test_each_page_of_an_idle_guest_is_sent_once() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    run = await migrate(guest, Policy(chunk=1 << 18))
    run.assert_equal()
    assert run.stats.pages_sent == PAGES
    assert run.stats.pages_resent == 0


async def test_no_chunk_holds_more_dirty_bytes_than_asked_for() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(0, PAGES, 3))
    run = await migrate(guest, Policy(chunk=1 << 18))
    assert run.stats.chunks >= PAGES // 3 // 64
    assert all(block.data_pages <= 64 for block in run.links[0].blocks)


async def test_no_chunk_spans_more_than_asked_for() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(0, PAGES, 50))
    run = await migrate(guest, Policy(chunk_span=1 << 20))
    run.assert_equal()
    assert run.stats.chunks == -(-PAGES // 256)
    assert all(block.first // 256 == (block.first + block.span - 1) // 256 for block in run.links[0].blocks)


async def test_a_delayed_connection_never_lets_an_old_page_overtake_a_new_one() -> None:
    """Every block of a round takes any connection; one of them is slow, and the same pages are written every round."""
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    slow = MemoryLink(delay=lambda: asyncio.sleep(0.01))  # type: ignore[arg-type,return-value]
    guest.after_take = lambda: guest.write(np.arange(0, PAGES, 5)) if "pause" not in guest.calls else None
    policy = replace(MANY_ROUNDS, streams=3, chunk=1 << 18)
    run = await migrate(guest, policy, links=[MemoryLink(), slow, MemoryLink()])
    run.assert_equal()
    assert len(slow.blocks) > 3
    assert run.stats.rounds >= 4


async def test_the_guest_stays_when_it_does_not_converge() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    guest.before_take = lambda: guest.write(np.arange(PAGES))
    with pytest.raises(ExceptionGroup) as caught:
        await migrate(guest, Policy(max_rounds=3, downtime=0.000001))
    assert caught.group_contains(NotConverging, match="still dirty")
    assert "pause" not in guest.calls


async def test_it_moves_all_the_same_when_the_operator_said_switch() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))

    def write() -> None:
        if "pause" not in guest.calls:
            guest.write(np.arange(PAGES))

    guest.before_take = write
    run = await migrate(guest, Policy(max_rounds=3, downtime=0.000001, on_timeout="switch"))
    run.assert_equal()
    assert run.stats.rounds == 4


async def test_when_time_is_up_in_the_middle_of_the_first_round_the_rest_goes_in_the_last() -> None:
    guest = ModelGuest(40 * 1024)
    guest.write(np.arange(0, 40 * 1024, 2))
    slow = MemoryLink(delay=lambda: asyncio.sleep(0.004))  # type: ignore[arg-type,return-value]
    policy = Policy(timeout=0.05, downtime=0.000001, on_timeout="switch", chunk=1 << 18)
    run = await migrate(guest, policy, links=[slow])
    run.assert_equal()
    assert run.stats.rounds == 2
    assert run.stats.pages_sent == 20 * 1024


class Backwards(ModelGuest):
    """A guest whose clears come after the read: the order that the whole project is about, broken."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self._owed: list[tuple[int, int, int]] = []
        self.late = [10, 11]
        """Pages that the guest writes after they were read and before they are cleared."""

    async def take_and_clear(self, region: int, first: int, count: int):  # type: ignore[no-untyped-def]
        assert self.user is not None
        pending = bitmap.extract(self.user.sync()[region], first, count)
        await asyncio.sleep(0)
        self._owed.append((region, first, count))
        return pending

    async def sync(self):  # type: ignore[no-untyped-def]
        assert self.user is not None
        self.user.sync()
        if self._owed:
            self.write(self.late)
        self.user.sync()
        for region, first, count in self._owed:
            self.user.take_and_clear(region, first, count, self.array.map.generation)
        self._owed.clear()
        return await super().sync()


async def test_the_comparison_bites_a_clear_after_the_read_loses_pages() -> None:
    guest = Backwards(PAGES)
    guest.write(np.arange(PAGES))
    run = await migrate(guest, Policy())
    with pytest.raises(AssertionError, match=r"pages that differ: \[10, 11\]"):
        run.assert_equal()


async def test_memory_in_flight_is_bounded_by_the_channels() -> None:
    guest = ModelGuest(8192)
    guest.write(np.arange(8192))
    run = await migrate(guest, Policy(streams=2))
    run.assert_equal()
    assert run.stats.bytes_memory == 8192 * PAGE_SIZE
    assert run.stats.window.count == run.stats.chunks
