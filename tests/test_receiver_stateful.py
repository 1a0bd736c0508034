"""A destination and a source that mixes what is right with what is not, in any order.

Whatever comes, nothing is written beside guest memory, and what is allocated stays bounded. After the first thing that
is wrong the guest never runs; without one, and with everything sent and committed, it does, and its memory is right.
"""

from __future__ import annotations

import asyncio
import gc
import os
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import zstandard
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from amig.digest import PageDigests
from amig.errors import AmigError, HostError, LinkLost, VerifyFailed
from amig.memory import PAGE_SIZE
from amig.session import inbound
from amig.session.inbound import Inbound
from amig.wire import limits, messages
from amig.wire.block import Codec, describe
from amig.wire.frames import HEADER_SIZE
from amig.wire.frametype import FrameType
from amig.wire.messages import Commit, Ping
from tests.fuzz import streams
from tests.fuzz.receiver import ID, KEY, MAP, FencedGuest, a_block, hello, one_page, round_end, token_of

STATE = b"device state"
MOST_MEMORY = 64 << 20
KEEP = 1000.0
"""Seconds: never over. What a step leads to must not hang on how busy the machine is: Hypothesis takes one that fails
now and not the next time for data that is not generated in the same way twice."""
REGIONS = st.sampled_from(MAP.regions)


class Wire:
    """A connection that is fed step by step."""

    gathers = False
    pages = None
    identity = b""
    peer = "a source"
    bytes_sent = bytes_received = 0

    def __init__(self) -> None:
        self.said = bytearray()
        self.heard = bytearray()
        self.ended = False
        self.starved = False
        self._more = asyncio.Event()

    def feed(self, data: bytes, *, end: bool = False) -> None:
        self.said += data
        self.ended = self.ended or end
        self.starved = False
        self._more.set()

    async def send(self, *buffers: Any) -> None:
        for buffer in buffers:
            self.heard += memoryview(buffer).cast("B") if memoryview(buffer).nbytes else b""

    async def recv_into(self, *views: Any) -> None:
        for view in views:
            flat = memoryview(view).cast("B")
            while len(self.said) < len(flat):
                if self.ended:
                    flat[: len(self.said)] = self.said  # as a socket does
                    raise LinkLost("the source has gone")
                self.starved = True
                self._more.clear()
                await self._more.wait()
            flat[:] = self.said[: len(flat)]
            del self.said[: len(flat)]

    def outstanding(self) -> None:
        return None

    async def close(self) -> None:
        pass

    def abort(self) -> None:
        self.feed(b"", end=True)


class Comes:
    """A listener to which the source comes back."""

    address = "here"

    def __init__(self) -> None:
        self.wires: asyncio.Queue[Wire | None] = asyncio.Queue()

    async def accept(self) -> Wire:
        wire = await self.wires.get()
        if wire is None:
            raise HostError("nobody comes any more")
        return wire

    async def close(self) -> None:
        self.wires.put_nowait(None)


class Measured(asyncio.Runner):
    """Notes the most that was allocated while it ran, and what of it stayed.

    Only then: what Hypothesis itself allocates between the steps, most of it before the first, is not ours. A limit
    that it exceeds once and not again looks to it like data that is not generated in the same way twice.
    """

    stays = most = 0

    def run(self, *args: Any, **more: Any) -> Any:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            return super().run(*args, **more)
        finally:
            now, peak = tracemalloc.get_traced_memory()
            self.most = max(self.most, self.stays + peak - before)
            self.stays += now - before


class Receiver(RuleBasedStateMachine):
    def __init__(self, *features: str) -> None:
        super().__init__()
        self.features = features
        self.environment = ExitStack()
        self.environment.enter_context(patch.dict(os.environ, XDG_STATE_HOME="/proc/none"))
        self.environment.enter_context(patch.object(inbound, "LAST_WORD_TIMEOUT", 0.02))
        tracemalloc.start()
        self.runner = Measured()
        self.guest = FencedGuest()
        self.wrong = ""
        self.round = self.here = self.data = self.zero = 0
        self.since = 0
        self.unheard: tuple[int, dict[int, int]] | None = None
        self.held: dict[int, int] = {}
        self.state_sent = self.ended = self.committed = False
        self.memory = {r.id: np.zeros((r.pages, PAGE_SIZE), np.uint8) for r in MAP.regions}
        self.runner.run(self.begin())

    async def begin(self) -> None:
        self.wire = Wire()
        self.comes = Comes()
        self.task = asyncio.create_task(Inbound(self.wire, self.comes, self.guest, release="test", keep=KEEP).run())
        await self.settle(hello(1, *self.features, optional=(messages.RESUME_FEATURE,)))
        self.token = token_of(bytes(self.wire.heard))

    async def settle(self, data: bytes, *, end: bool = False) -> None:
        """Say something, and wait until the destination has taken it in, or has given up."""
        self.wire.feed(data, end=end)
        while not self.task.done() and not (self.wire.starved and not end):
            await asyncio.sleep(0)

    def say(self, data: bytes) -> None:
        self.runner.run(self.settle(data))

    # --- what a good source says -------------------------------------------------------------------------------------

    def filling(self) -> bool:
        return not self.ended

    @precondition(filling)
    @rule(region=REGIONS, data=st.data(), packed=st.booleans(), summed=st.booleans(), fill=st.integers(0, 255))
    def block(self, region: Any, data: st.DataObject, packed: bool, summed: bool, fill: int) -> None:
        first = 64 * data.draw(st.integers(0, (region.pages - 1) // 64))
        span = min(64, region.pages - first)
        # No page goes twice in a round: one that has landed could be placed over by one that is being decompressed.
        pages = data.draw(st.integers(1, 2**span - 1)) & ~(self.held.get(region.id, 0) >> first)
        if not pages:
            return
        zero = pages & data.draw(st.integers(0, 2**span - 1))
        numbers = [i for i in range(span) if (pages & ~zero) >> i & 1]
        content = bytes([fill, self.round % 251]) * (PAGE_SIZE // 2) * len(numbers)
        changes = {
            "round": self.round,
            "region": region.id,
            "first_page": first,
            "span_pages": span,
            "pages": np.array([pages], np.uint64),
            "zero": np.array([zero], np.uint64),
        }
        said = a_block(content, packed=packed and bool(numbers), summed=summed, **changes)
        torn = data.draw(st.integers(0, len(said) - 1)) if data.draw(st.integers(0, 7)) == 0 else 0
        if torn and not self.wrong:
            self.hears()
            self.runner.run(self.torn(said[:torn]))
            changes["round"] = self.round
            content = bytes([fill, self.round % 251]) * (PAGE_SIZE // 2) * len(numbers)
            said = a_block(content, packed=packed and bool(numbers), summed=summed, **changes)
        self.hears()
        self.say(said)
        self.held[region.id] = self.held.get(region.id, 0) | pages << first
        self.here += pages.bit_count()
        self.data += len(numbers)
        self.zero += zero.bit_count()
        for i in range(span):
            if pages >> i & 1:
                self.memory[region.id][first + i] = 0
        for i in numbers:
            self.memory[region.id][first + i] = np.frombuffer(content[:PAGE_SIZE], np.uint8)

    @precondition(filling)
    @rule()
    def end_of_round(self) -> None:
        self.hears()
        self.say(round_end(self.round, self.here))
        self.round += 1
        self.here = 0
        self.held = {}

    @precondition(lambda self: not self.ended and not self.wrong)
    @rule(heard=st.booleans())
    def come_back(self, heard: bool) -> None:
        """The connection is lost; the source returns, and may lose the answer, too."""
        self.runner.run(self.back(heard=heard))

    def hears(self) -> None:
        """A source that goes on has heard the answer before."""
        if self.unheard is not None:
            self.since, self.unheard = self.round, None

    async def torn(self, said: bytes) -> None:
        self.wire.feed(said)
        await self.back(heard=True)

    async def back(self, *, heard: bool) -> None:
        gc.collect()  # buffers of earlier connections wait for it: whether it has run would be left to chance
        self.wire.feed(b"", end=True)
        self.wire = Wire()
        rounds, held = (self.round, self.held) if self.unheard is None else self.unheard
        begins = max(self.round, rounds) + 1
        resume = messages.Resume(migration=ID, token=self.token, since=self.since, round=begins)
        self.wire.said += streams.message(resume)
        self.comes.wires.put_nowait(self.wire)
        while not self.task.done() and not self.wire.starved:
            await asyncio.sleep(0)
        found: dict[int, int] = {}
        answered = None
        for piece in streams.cut(bytes(self.wire.heard)):
            kind = FrameType(piece[4])
            message = messages.decode(kind, piece[HEADER_SIZE:])
            if isinstance(message, messages.Held):
                found[message.region] = int.from_bytes(message.pages, "little") << message.first
            elif isinstance(message, messages.Resumed):
                answered = message.rounds
        assert (answered, found) == (rounds, held), "it says that something else is in place than what came"
        self.round, self.here, self.data, self.zero, self.held = begins, 0, 0, 0, {}
        self.state_sent = False
        if heard:
            self.since, self.unheard = begins, None
        else:
            self.unheard = rounds, held

    @rule()
    def ping(self) -> None:
        self.say(streams.message(Ping(seq=1, sent_ns=2)))

    @precondition(lambda self: not self.state_sent)
    @rule()
    def state(self) -> None:
        self.say(streams.state(STATE))
        self.state_sent = True

    @precondition(lambda self: self.state_sent and not self.ended)
    @rule()
    def end(self) -> None:
        if self.here:
            self.end_of_round()
        self.say(streams.end(self.round, self.data, self.zero, STATE))
        self.ended = True

    @precondition(lambda self: self.ended and not self.committed)
    @rule()
    def commit(self) -> None:
        self.committed = True
        self.say(streams.message(Commit(migration=ID)))

    # --- what nobody may say -----------------------------------------------------------------------------------------

    @precondition(lambda self: not self.committed and not self.wrong)
    @rule(data=st.data(), often=st.integers(0, 5))
    def lie(self, data: st.DataObject, often: int) -> None:
        if often:
            return
        self.wrong = data.draw(st.sampled_from(sorted(LIES)))
        self.notices(self.wrong)

    def notices(self, lie: str) -> None:
        """Say what is wrong; the destination gives up without hearing more."""
        self.wrong = lie
        self.wire.feed(LIES[lie](self))
        self.runner.run(self.give_up())

    async def give_up(self) -> None:
        async with asyncio.timeout(30):
            await asyncio.wait([self.task])

    # --- what holds --------------------------------------------------------------------------------------------------

    @invariant()
    def nothing_beside_guest_memory(self) -> None:
        self.guest.check_memory()

    @invariant()
    def memory_is_bounded(self) -> None:
        assert self.runner.most < MOST_MEMORY

    @invariant()
    def the_guest_runs_only_when_all_was_right(self) -> None:
        runs = "run" in self.guest.calls
        assert runs <= (self.committed and not self.wrong), f"it runs, and there was {self.wrong or 'no COMMIT'}"
        if self.wrong and self.task.done():
            assert isinstance(self.task.exception(), AmigError)

    def teardown(self) -> None:
        try:
            self.runner.run(self.leave())
            self.guest.check()
            error = self.task.exception()
            if self.committed and not self.wrong:
                assert error is None, f"a good guest was refused: {error!r}"
                for region, content in self.memory.items():
                    assert (self.guest.pages(region) == content).all(), "its memory is wrong"
            else:
                assert isinstance(error, AmigError), f"no refusal but {error!r} after {self.wrong}"
        finally:
            self.runner.close()
            tracemalloc.stop()
            self.environment.close()

    async def leave(self) -> None:
        await self.comes.close()
        await self.settle(b"", end=True)
        await asyncio.wait([self.task])


def packed(receiver: Receiver, content: bytes, *, pages: int = 1) -> bytes:
    """A block of so many pages whose data are these bytes, said to be zstd; a round's end has it looked at."""
    bits = np.array([2**pages - 1], np.uint64)
    changes = {"round": receiver.round, "pages": bits, "zero": bits & np.uint64(0), "codec": Codec.ZSTD}
    block = streams.block(describe(region=0, first_page=0, span_pages=64, data_bytes=len(content), **changes), content)
    return block + round_end(receiver.round, receiver.here + pages)


def header(kind: int, length: int) -> bytes:
    """A frame's header alone."""
    return length.to_bytes(4, "little") + bytes([kind, 0, 0, 0]) + bytes(8)


def damaged(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


def poked(frame: bytes, at: int, value: bytes) -> bytes:
    """A frame with other bytes at that place of its payload, and a right checksum."""
    at += HEADER_SIZE
    return streams.mend(frame[:at] + value + frame[at + len(value) :])


BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(PAGE_SIZE))
PAGE = b"page" * 1024
u32 = (2**32 - 1).to_bytes(4, "little")

LIES: dict[str, Callable[[Receiver], bytes]] = {
    "a frame of unknown type": lambda r: header(99, 16),
    "a frame of type 0": lambda r: header(0, 16),
    "a message above its limit": lambda r: header(FrameType.ROUND, limits.MAX_CONTROL + 1),
    "a state part above its limit": lambda r: header(FrameType.STATE, limits.MAX_STATE_PART + 17),
    "a block above its limit": lambda r: header(FrameType.BLOCK, 2**32 - 1),
    "a second HELLO": lambda r: hello(1),
    "a JOIN": lambda r: streams.message(messages.Join(migration=ID, token=bytes(32), stream=1)),
    "a WELCOME": lambda r: streams.message(messages.Welcome(migration=ID, name="x", identity="x", token=bytes(32))),
    "PREPARED": lambda r: streams.message(messages.Prepared(migration=ID)),
    "RUNNING": lambda r: streams.message(messages.Running(migration=ID)),
    "DISCARDED": lambda r: streams.message(messages.Discarded(migration=ID, reason="")),
    "ABORT": lambda r: streams.message(messages.Abort(code="failed", reason="why")),
    "a COMMIT to another migration": lambda r: streams.message(Commit(migration="f" * 32)),
    "a damaged message": lambda r: damaged(streams.message(Ping(seq=1, sent_ns=1))),
    "a damaged block": lambda r: damaged(one_page(5, PAGE, round=r.round)),
    "a block of another round": lambda r: one_page(5, PAGE, round=r.round + 1),
    "a block of no region": lambda r: one_page(5, PAGE, round=r.round, region=3),
    "a block behind its region": lambda r: one_page(5 + 128, PAGE, round=r.round, region=7),
    "a block across its region's end": lambda r: one_page(71, PAGE, round=r.round, region=7),
    "a block far away": lambda r: poked(one_page(5, PAGE, round=r.round), 8, (2**64 - 64).to_bytes(8, "little")),
    "a block that is not aligned": lambda r: poked(one_page(5, PAGE, round=r.round), 8, b"\1"),
    "a block of too many pages": lambda r: poked(one_page(5, PAGE, round=r.round), 24, u32),
    "a block with another number of pages": lambda r: poked(one_page(5, PAGE, round=r.round), 24, b"\2"),
    "a block with more zero pages": lambda r: poked(one_page(5, PAGE, round=r.round), 28, b"\1"),
    "a bitmap with bits behind its span": lambda r: poked(one_page(5, PAGE, round=r.round), 47, b"\x80"),
    "zero pages that it does not speak of": lambda r: poked(one_page(5, PAGE, round=r.round), 48, b"\1"),
    "a block with another length": lambda r: poked(one_page(5, PAGE, round=r.round), 32, u32),
    "a block that claims to become more": lambda r: poked(one_page(5, PAGE, round=r.round), 36, u32),
    "a bomb": lambda r: packed(r, BOMB[:PAGE_SIZE]),
    "a bomb that does not state its size": lambda r: packed(r, UNSIZED),
    "zstd that is none": lambda r: packed(r, b"no zstd"),
    "zstd that is cut off": lambda r: packed(r, zstandard.compress(os.urandom(2000) + bytes(PAGE_SIZE - 2000))[:-9]),
    "zstd of too few pages": lambda r: packed(r, zstandard.compress(bytes(PAGE_SIZE)), pages=2),
    "the end of another round": lambda r: round_end(r.round + 1, r.here),
    "the end of a round before": lambda r: round_end(r.round - 1, r.here) if r.round else round_end(7, 0),
    "a round with another number of pages": lambda r: round_end(r.round, r.here + 1),
    "a state that begins in its middle": lambda r: streams.mend(
        header(FrameType.STATE, 0) + (20).to_bytes(8, "little") + (12 + r.state_sent).to_bytes(8, "little") + b"more"
    ),
    "a state without end": lambda r: streams.mend(header(FrameType.STATE, 0) + bytes([255] * 8) + bytes(8) + b"x"),
    "an end with other numbers": lambda r: streams.end(r.round, r.data + 1, r.zero, STATE),
    "an end with another state": lambda r: streams.end(r.round, r.data, r.zero, STATE + b"!"),
}
"""A COMMIT too early is a lie only before END, so it is a test of its own below."""


def test_whatever_a_source_mixes_the_guest_runs_whole_or_never() -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Receiver,
        settings=settings(max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=checks),
    )


def test_every_lie_is_found_out_in_every_state() -> None:
    """The machine's own lies, one by one: before anything, after a round, after the state, and after END."""
    steps: list[Callable[[Receiver], None]] = [Receiver.end_of_round, Receiver.state, Receiver.end]
    for lie in sorted(LIES):
        for count in range(len(steps) + 1):
            receiver = Receiver()
            try:
                for step in steps[:count]:
                    step(receiver)
                receiver.notices(lie)
                receiver.nothing_beside_guest_memory()
                receiver.memory_is_bounded()
                receiver.the_guest_runs_only_when_all_was_right()
            finally:
                receiver.teardown()


def test_a_commit_before_the_end_is_refused() -> None:
    for count in range(3):
        receiver = Receiver()
        try:
            for step in (Receiver.end_of_round, Receiver.state)[:count]:
                step(receiver)
            receiver.wrong = "COMMIT before END"
            receiver.say(streams.message(Commit(migration=ID)))
            assert "run" not in receiver.guest.calls
        finally:
            receiver.teardown()


async def placed(receiver: Receiver) -> None:
    """Wait until PLACED has come: what comes now may land in guest memory at once."""
    async with asyncio.timeout(30):
        while FrameType(streams.cut(bytes(receiver.wire.heard))[-1][4]) is not FrameType.PLACED:
            await asyncio.sleep(0)


def finish(receiver: Receiver) -> None:
    for step in (Receiver.end_of_round, Receiver.state, Receiver.end, Receiver.commit):
        step(receiver)


def test_a_page_that_landed_in_part_and_then_comes_as_zero_is_zero() -> None:
    """Fresh memory is zero, so a zero page is not written there: what landed in part must not stay."""
    receiver = Receiver()
    try:
        receiver.runner.run(receiver.torn(one_page(5, PAGE)[:-1]))
        zero = np.array([1 << 5], np.uint64)
        receiver.say(one_page(5, b"", round=receiver.round, zero=zero))
        receiver.here, receiver.zero = 1, 1
        finish(receiver)
    finally:
        receiver.teardown()


def test_a_page_that_landed_in_part_and_never_comes_again_is_never_taken_for_right() -> None:
    """Should a source ever forget to send it: the digests must not agree."""
    memory = np.zeros((MAP.regions[0].pages, PAGE_SIZE), np.uint8)
    memory[5] = np.frombuffer(PAGE, np.uint8)
    digests = PageDigests(MAP.regions, int.from_bytes(KEY, "little"))
    digests.hash(0, memory, np.array([5]))
    receiver = Receiver(messages.DIGESTS_FEATURE)
    try:
        receiver.say(one_page(5, PAGE))
        receiver.here = 1
        receiver.held = {0: 1 << 5}
        receiver.end_of_round()
        receiver.runner.run(placed(receiver))
        receiver.runner.run(receiver.torn(one_page(5, PAGE[::-1], round=1)[:-1]))
        receiver.state()
        receiver.wrong = "a page that was not sent again"
        receiver.say(streams.end(receiver.round, 0, 0, STATE, digests.roots()))
        receiver.runner.run(receiver.give_up())
        assert isinstance(receiver.task.exception(), VerifyFailed)
    finally:
        receiver.teardown()
