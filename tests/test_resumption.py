"""What both sides keep of a connection that is lost, and what a destination may say of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from amig import bitmap
from amig.errors import LinkLost, PeerError
from amig.memory import MemoryMap, Pages, Region, Slot, Words
from amig.session.agreement import Hearing, told
from amig.session.alive import keep_alive
from amig.session.door import Door
from amig.session.questions import Records
from amig.session.tasks import apart
from amig.stages.buffers import BufferPool
from amig.stages.channel import channel
from amig.stages.items import Block, Codec
from amig.stages.ledger import Ledger
from amig.stages.receive import Receive
from amig.stages.resumption import Answer, Placement
from amig.wire.limits import MAX_HELD_BYTES
from amig.wire.messages import Held, Message, Ping, Resume

BIG = MAX_HELD_BYTES * 8 + 100
REGIONS = (Region(id=3, size=100 * 4096), Region(id=7, size=BIG * 4096))
MAP = MemoryMap(
    generation=1,
    regions=REGIONS,
    slots=tuple(
        Slot(index=i, guest_phys=i << 40, size=region.size, region=region.id, offset=0)
        for i, region in enumerate(REGIONS)
    ),
)


def pages(*numbers: int, size: int = 100) -> Words:
    return bitmap.from_pages(np.array(numbers, np.int64), size)


def numbers(words: Words) -> list[int]:
    return bitmap.to_pages(words).tolist()


# --- the destination's answer ----------------------------------------------------------------------------------------


def heard(*messages: Held, rounds: int = 0) -> Answer:
    hearing = Hearing(MAP)
    for message in messages:
        hearing.add(message)
    return hearing.answer(rounds)


def test_what_is_told_is_heard_and_nothing_is_said_of_empty_ranges() -> None:
    held = {3: pages(0, 99), 7: pages(MAX_HELD_BYTES * 8 + 1, size=BIG)}
    messages = list(told(held))
    assert [(m.region, m.first) for m in messages] == [(3, 0), (7, MAX_HELD_BYTES * 8)]
    answer = heard(*messages, rounds=4)
    assert answer.rounds == 4
    assert {region: numbers(words) for region, words in answer.held.items()} == {
        region: numbers(words) for region, words in held.items()
    }


@pytest.mark.parametrize(
    "lies",
    [
        [Held(region=4, first=0, pages=bytes(8))],
        [Held(region=3, first=63, pages=bytes(8))],
        [Held(region=3, first=128, pages=bytes(8))],
        [Held(region=3, first=0, pages=bytes(24))],
        [Held(region=3, first=2**62, pages=bytes(8))],
        [Held(region=3, first=0, pages=bytes(9))],
        [Held(region=3, first=64, pages=b"\xff" * 8)],
        [Held(region=3, first=0, pages=bytes(8)), Held(region=3, first=0, pages=bytes(8))],
        [Held(region=3, first=64, pages=bytes(8)), Held(region=3, first=0, pages=bytes(8))],
        [Held(region=7, first=0, pages=bytes(8)), Held(region=3, first=0, pages=bytes(8))],
    ],
    ids=["region", "odd", "past", "long", "far", "bytes", "tail", "twice", "back", "order"],
)
def test_pages_that_the_guest_has_not_or_that_were_named_before_are_refused(lies: list[Held]) -> None:
    with pytest.raises(PeerError, match="named pages"):
        heard(*lies)


# --- the source's ledger ---------------------------------------------------------------------------------------------


def ledger() -> Ledger:
    """Round 0 is in place, of round 1 pages 5 to 9 are in flight, and of round 2, which is not over, 9 and 20."""
    ledger = Ledger(REGIONS)
    for round_, some in ((0, (1, 2, 3)), (1, (5, 6, 7, 8, 9)), (2, (9, 20))):
        ledger.take(round_, 3, 0, pages(*some))
        if round_ < 2:
            ledger.all_taken(round_)
    ledger.placed(0)
    return ledger


@pytest.mark.parametrize(
    ("rounds", "held", "missing"),
    [
        (1, (), [5, 6, 7, 8, 9, 20]),
        (1, (5, 6, 9), [7, 8, 9, 20]),
        (2, (), [9, 20]),
        (2, (20,), [9]),
        (2, (9, 20), []),
    ],
)
def test_what_was_in_flight_and_is_not_in_place_is_missing(
    rounds: int, held: tuple[int, ...], missing: list[int]
) -> None:
    found = ledger().resume(Answer(rounds=rounds, held={3: pages(*held)}), 4, first_pass=False)
    assert [number for words in found.values() for number in numbers(words)] == missing


@pytest.mark.parametrize(
    ("rounds", "held"),
    [(0, ()), (3, ()), (1 << 20, ()), (1, (4,)), (1, (20,)), (2, (5,)), (1, (1,))],
    ids=["less-than-placed", "not-over", "never", "not-sent", "of-another-round", "of-one-before", "long-placed"],
)
def test_an_answer_that_can_not_be_is_refused(rounds: int, held: tuple[int, ...]) -> None:
    mine = ledger()
    with pytest.raises(PeerError, match="the peer says"):
        mine.resume(Answer(rounds=rounds, held={3: pages(*held)}), 4, first_pass=False)


def test_rounds_of_before_count_no_more_once_it_goes_on() -> None:
    mine = ledger()
    mine.resume(Answer(rounds=1, held={}), 4, first_pass=False)
    for old in (0, 1, 2, 3):
        with pytest.raises(PeerError, match="was not sent"):
            mine.placed(old)
    with pytest.raises(PeerError, match="the peer says"):
        mine.resume(Answer(rounds=2, held={}), 5, first_pass=False)
    assert not mine.resume(Answer(rounds=4, held={}), 5, first_pass=False)
    assert mine.since == 5


def test_in_a_first_pass_only_what_is_in_place_counts_as_known() -> None:
    mine = Ledger(REGIONS)
    mine.take(0, 3, 0, pages(1, 2, 3))
    mine.resume(Answer(rounds=0, held={3: pages(2)}), 1, first_pass=True)
    assert numbers(mine.known[3]) == [2]
    mine.take(1, 3, 0, pages(1, 2, 4))
    mine.resume(Answer(rounds=1, held={3: pages(4)}), 2, first_pass=True)
    assert numbers(mine.known[3]) == [2, 4]


# --- what the destination keeps --------------------------------------------------------------------------------------


def placement(*current: int) -> Placement:
    found = Placement(REGIONS, remember=True)
    found.end_round(0)
    assert found.current is not None
    found.current[3] |= pages(*current)
    return found


def test_an_answer_that_was_not_heard_is_given_again() -> None:
    here = placement(5)
    first = here.answer(0)
    assert (first.rounds, numbers(first.held[3])) == (1, [5])
    here.go_on(0, 4)
    again = here.answer(0)
    assert (again.rounds, numbers(again.held[3])) == (1, [5])
    here.go_on(0, 6)
    assert here.rounds == 6
    heard = here.answer(6)
    assert (heard.rounds, numbers(heard.held[3])) == (6, [])


def test_a_source_that_heard_nothing_and_yet_sent_something_is_refused() -> None:
    here = placement(5)
    here.go_on(0, 4)
    assert here.current is not None
    here.current[3] |= pages(1)
    with pytest.raises(PeerError, match="began with round 0"):
        here.answer(0)
    with pytest.raises(PeerError, match="began with round 3"):
        placement().answer(3)


def test_a_round_that_was_used_is_not_used_again() -> None:
    here = placement(5)
    with pytest.raises(PeerError, match="which it has used"):
        here.go_on(0, 1)


def test_a_round_that_ends_leaves_nothing_to_be_named() -> None:
    here = placement(5)
    here.end_round(1)
    answer = here.answer(0)
    assert answer.rounds == 2
    assert not list(told(answer.held))


# --- whether a connection lives --------------------------------------------------------------------------------------


class Silent:
    """A connection whose counters stand where they are put, and what was said on it."""

    def __init__(self) -> None:
        self.bytes_received = self.bytes_sent = 0
        self.waits: int | None = 0
        self.said: list[Message] = []
        self.connection = self
        self.protocol = None
        self.peer = "somebody"

    def outstanding(self) -> int | None:
        return self.waits

    async def send_message(self, message: Message) -> int:
        self.said.append(message)
        self.bytes_sent += 30
        return 30


async def watched(link: Silent, **more: Any) -> None:
    async with asyncio.timeout(5):
        await keep_alive([link], every=0.01, limit=0.04, **more)  # type: ignore[list-item]


async def test_one_that_answers_nothing_is_asked_once_and_then_lost() -> None:
    link = Silent()
    with pytest.raises(LinkLost, match="nothing has come from somebody"):
        await watched(link)
    assert [type(message) for message in link.said] == [Ping]


async def test_our_own_question_is_no_sign_of_life() -> None:
    link = Silent()
    looks = 0

    def outstanding() -> int:
        nonlocal looks
        looks += 1
        return 0

    link.outstanding = outstanding  # type: ignore[method-assign]
    with pytest.raises(LinkLost):
        await watched(link)
    assert looks == 1 + 4 + 1, "the first look, four that see nothing, and one before the question"


async def test_one_that_answers_is_asked_again_and_again() -> None:
    class Answers(Silent):
        async def send_message(self, message: Message) -> int:
            self.bytes_received += 30
            return await super().send_message(message)

    link = Answers()
    task = asyncio.create_task(watched(link))
    async with asyncio.timeout(5):
        while len(link.said) < 10:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


@pytest.mark.parametrize("counter", ["bytes_received", "bytes_sent", "waits"])
async def test_one_on_which_anything_moves_is_alive_and_left_alone(counter: str) -> None:
    """Also one that is slow: our kernel may take nothing for long while the peer's acknowledges."""
    link = Silent()
    link.waits = 1 << 20
    task = asyncio.create_task(watched(link))
    for _ in range(300):
        setattr(link, counter, getattr(link, counter) + 1)
        await asyncio.sleep(0.001)
    assert not task.done()
    assert not link.said
    task.cancel()
    await asyncio.wait({task})


async def test_nothing_is_expected_while_the_other_side_is_busy() -> None:
    link = Silent()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await watched(link, while_=lambda: False)
    assert not link.said


# --- who comes through the door, and what is dropped ------------------------------------------------------------------


class Shows:
    """A connection that has proved to be somebody."""

    def __init__(self, identity: bytes) -> None:
        self.connection = self
        self.identity = identity

    def abort(self) -> None:
        pass


@pytest.mark.parametrize(
    ("identity", "changes", "admitted"),
    [
        (b"hosta", {}, True),
        (b"hostb", {}, False),
        (b"", {}, False),
        (b"hosta", {"token": bytes(32)}, False),
        (b"hosta", {"token": b"t" * 31}, False),
        (b"hosta", {"migration": "1" * 32}, False),
    ],
)
async def test_only_the_source_itself_comes_back(identity: bytes, changes: dict[str, Any], admitted: bool) -> None:
    door = Door(None, Records(), migration="0" * 32, token=b"t" * 32, identity=b"hosta", name="web1")  # type: ignore[arg-type]
    message = Resume(**({"migration": "0" * 32, "token": b"t" * 32, "since": 0, "round": 1} | changes))
    assert door.keep(Shows(identity), message) is admitted  # type: ignore[arg-type]
    assert not door.keep(Shows(b"hosta"), Ping(seq=1, sent_ns=1))  # type: ignore[arg-type]


class Landing:
    """Notes what landed and will never be placed."""

    def __init__(self) -> None:
        self.spoilt: list[tuple[int, int, list[int]]] = []

    def land(self, round_: int, region: int, first: int, fresh: Words) -> None:
        return None

    def spoil(self, region: int, first: int, landed: Words) -> None:
        self.spoilt.append((region, first, numbers(landed)))


async def test_what_has_landed_and_can_not_be_passed_on_is_said_to_be_spoilt() -> None:
    """One connection waits with a block that has landed, for room, when another is lost."""
    landing = Landing()
    lost = asyncio.Event()
    bits = pages(1, 2, size=64)
    block = Block(
        round=0, region=3, first=64, span=64, pages=bits, zero=pages(2, size=64), data_pages=1, zero_pages=1,
        codec=Codec.RAW, data=None, size=0,
    )  # fmt: skip

    class Brings:
        async def receive(self, buffer: Pages, landing: object) -> Block:
            return replace(block, size=10)

    class Breaks:
        async def receive(self, buffer: Pages, landing: object) -> Block:
            await lost.wait()
            raise LinkLost("gone")

    blocks_in, blocks = channel(1)
    receive = Receive([Brings(), Breaks()], blocks_in, pool=BufferPool(4), landing=landing, keeps=True)  # type: ignore[arg-type, list-item]
    running = asyncio.create_task(receive.run())
    async with asyncio.timeout(5):
        while blocks.statistics().items == 0:
            await asyncio.sleep(0)
        lost.set()
        await running
        assert [item.first async for item in blocks] == [64]  # type: ignore[union-attr]
    assert receive.lost == "gone"
    assert landing.spoilt == [(3, 64, [1])]


async def test_a_cancellation_that_comes_with_a_lost_connection_is_not_lost_with_it() -> None:
    began = asyncio.Event()

    async def breaks() -> None:
        began.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            raise LinkLost("the connection broke while it was cancelled")

    task = asyncio.create_task(apart(breaks()))
    await began.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
