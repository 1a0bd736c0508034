"""A migration that loses its connection goes on over another: nothing is lost, little is sent twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from amig.errors import LinkLost, PeerError, Refused
from amig.events import Event, Progress, State, StateChanged
from amig.guest import Outcome, RunState
from amig.memory import PAGE_SIZE
from amig.policy import Policy
from amig.session import agreement, door
from amig.session.destination import OutOfPatience
from amig.session.door import Asked
from amig.session.endpoints import open_destination
from amig.session.inbound import Phase
from amig.session.migration import Migration
from amig.session.peer import Peer
from amig.session.questions import Records
from amig.session.source import SourceSession
from amig.stages.resumption import Answer, Placement
from amig.transport import Connection, Dialer, listen
from amig.transport.framed import FramedConnection
from amig.wire import limits
from amig.wire.frametype import FrameType
from amig.wire.messages import (
    Discarded,
    End,
    Held,
    Join,
    Message,
    Ping,
    Placed,
    Query,
    Refuse,
    Resume,
    Resumed,
    Running,
)
from tests import receiving as one
from tests.modelguest import ModelGuest, ModelIncoming
from tests.receiving import PAGES, Receiver, assert_moved, assert_stayed, busy_guest
from tests.test_hostile_destination import OTHER, Liar
from tests.test_wire_messages import HELLO

KEEP = 20.0
QUICK = {"reconnect": 20.0, "chunk": 1 << 18, "connect_timeout": 5.0, "handover_timeout": 5.0}


def receiving(keep: float = KEEP, *, deaf: bool = False) -> AbstractAsyncContextManager[Receiver]:
    """A destination that keeps what it has."""
    return one.receiving(keep=keep, deaf=deaf)


def cutting(receiver: Receiver, sent: list[int]) -> Callable[[Event], None]:
    """Cut when so many bytes have gone out, one after the other."""

    def on_event(event: Event) -> None:
        if sent and isinstance(event, Progress) and event.state is State.MEMORY and event.bytes_sent >= sent[0]:
            sent.pop(0)
            receiver.cut()

    return on_event


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("more", [{}, {"compression": "zstd"}, {"delta_cache": 1 << 30, "compression": "zstd"}])
async def test_a_migration_goes_on_after_its_connection_broke(streams: int, more: dict[str, object]) -> None:
    guest = busy_guest()
    dice = np.random.default_rng(5)

    def work() -> None:
        if guest.state is RunState.RUNNING and dice.integers(3) == 0:
            guest.write(dice.integers(0, PAGES, 20), zero=bool(dice.integers(2)))

    guest.before_take = work
    states: list[State] = []
    async with receiving() as receiver, asyncio.timeout(60):
        cut = cutting(receiver, [1 << 20, 3 << 20, 5 << 20])

        def on_event(event: Event) -> None:
            if isinstance(event, StateChanged):
                states.append(event.state)
            cut(event)

        policy = Policy(bandwidth=8e6, streams=streams, timeout=5, on_timeout="switch", **QUICK, **more)  # type: ignore[arg-type]
        async with Migration(guest, receiver.address, policy, on_event=on_event) as migration:
            pass
        result = await migration.result()
    assert_moved(guest, receiver)
    assert result.reconnects >= 1
    assert result.verified == "digests"
    assert states.count(State.RECONNECTING) == result.reconnects
    assert Phase.LOST in receiver.phases or result.reconnects
    assert receiver.guest.calls[0] == "build"
    assert receiver.guest.calls.count("build") == 1


async def test_what_had_arrived_is_not_sent_again() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    async with receiving() as receiver, asyncio.timeout(60):
        on_event = cutting(receiver, [2 << 20, 4 << 20, 6 << 20, 8 << 20])
        policy = Policy(bandwidth=8e6, **QUICK)  # type: ignore[arg-type]
        async with Migration(guest, receiver.address, policy, on_event=on_event) as migration:
            pass
        result = await migration.result()
    assert_moved(guest, receiver)
    assert result.reconnects == 4
    assert result.bytes.wire < 1.1 * PAGES * PAGE_SIZE


async def test_without_time_to_reconnect_a_lost_connection_is_the_end() -> None:
    guest = busy_guest()
    async with receiving() as receiver:
        policy = Policy(bandwidth=2e6, **(QUICK | {"reconnect": 0}))  # type: ignore[arg-type]
        with pytest.raises(LinkLost):
            async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1])):
                pass
    assert_stayed(guest)
    assert receiver.guest.calls == ["build", "discard"]


async def test_a_destination_that_keeps_nothing_ends_it_with_the_reason() -> None:
    guest = busy_guest()
    async with receiving(keep=0) as receiver:
        policy = Policy(bandwidth=2e6, **QUICK)  # type: ignore[arg-type]
        with pytest.raises(LinkLost, match="can't be reconnected: it does not keep what has come"):
            async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1])):
                pass
    assert_stayed(guest)
    assert receiver.guest.calls == ["build", "discard"]


async def test_a_source_that_is_not_heard_any_more_keeps_the_guest_when_both_have_lost_patience() -> None:
    guest = busy_guest()
    async with receiving(keep=0.2, deaf=True) as receiver:
        policy = Policy(bandwidth=2e6, **(QUICK | {"reconnect": 0.6, "connect_timeout": 0.3}))  # type: ignore[arg-type]
        with pytest.raises(LinkLost, match=r"sought again for 0\.6 s"):
            async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1])):
                pass
    assert_stayed(guest)
    assert "did not come back within 0.2 s" in str(receiver.error)
    assert receiver.phases[-2:] == [Phase.LOST, Phase.DISCARDED]
    assert receiver.guest.calls == ["build", "discard"]


async def test_cancelling_while_the_destination_is_sought_keeps_the_guest() -> None:
    guest = busy_guest()
    migration: Migration

    def on_event(event: Event) -> None:
        cut(event)
        if isinstance(event, StateChanged) and event.state is State.RECONNECTING:
            asyncio.get_running_loop().call_later(0.1, migration.cancel)

    async with receiving(keep=0.5, deaf=True) as receiver, asyncio.timeout(30):
        cut = cutting(receiver, [1])
        policy = Policy(bandwidth=2e6, **QUICK)  # type: ignore[arg-type]
        async with Migration(guest, receiver.address, policy, on_event=on_event) as migration:
            pass
    assert migration.cancelled
    assert_stayed(guest)
    assert receiver.guest.calls == ["build", "discard"]


async def test_a_guest_that_was_paused_runs_before_the_destination_is_sought() -> None:
    guest = busy_guest()
    guest.on_save = lambda: receiver.cut()
    seen: list[tuple[State, RunState]] = []

    def on_event(event: Event) -> None:
        if isinstance(event, StateChanged):
            seen.append((event.state, guest.state))
            if event.state is State.RECONNECTING:
                guest.on_save = lambda: None

    async with receiving() as receiver, asyncio.timeout(30):
        async with Migration(guest, receiver.address, Policy(**QUICK), on_event=on_event) as migration:  # type: ignore[arg-type]
            pass
        result = await migration.result()
    assert_moved(guest, receiver)
    assert result.reconnects == 1
    assert (State.RECONNECTING, RunState.RUNNING) in seen
    assert [call for call in guest.calls if call in ("pause", "resume", "save")] == [
        "pause", "save", "resume", "pause", "save",
    ]  # fmt: skip


@pytest.mark.parametrize("step", ["STATE", "END"])
async def test_what_was_said_before_the_loss_counts_no_more(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state, digests or an end that had come are not taken together with those of a later connection."""
    guest = busy_guest()
    sent = 0
    kind = FrameType[step]
    send = FramedConnection._send

    async def cut_after(self: FramedConnection, what: FrameType, *parts: bytes) -> None:
        nonlocal sent
        await send(self, what, *parts)
        if what is kind and not sent:
            sent += 1
            self.abort()

    monkeypatch.setattr(FramedConnection, "_send", cut_after)
    async with receiving() as receiver, asyncio.timeout(30):
        policy = Policy(verify="full", **(QUICK | {"reconnect": 1.0}))  # type: ignore[arg-type]
        try:
            async with Migration(guest, receiver.address, policy) as migration:
                pass
        except LinkLost:
            assert step == "END", "what came before END can always be sent again"
        result = await migration.result()
    if result.status == "completed":
        assert result.verified == "full"
        assert_moved(guest, receiver)
    else:
        assert_stayed(guest)


async def test_a_page_that_is_a_hole_only_after_it_arrived_is_zero_there() -> None:
    """A first pass skips holes; after a return it may not skip those of which the destination has content."""
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    early = np.arange(0, 64)

    def on_event(event: Event) -> None:
        cut(event)
        if isinstance(event, StateChanged) and event.state is State.RECONNECTING:
            guest.write(early, zero=True)
            guest.array.touched[0][early] = False

    async with receiving() as receiver, asyncio.timeout(30):
        cut = cutting(receiver, [3 << 20])
        policy = Policy(bandwidth=8e6, **QUICK)  # type: ignore[arg-type]
        async with Migration(guest, receiver.address, policy, on_event=on_event):
            pass
    assert not guest.array.arrays[0][early].any()
    assert_moved(guest, receiver)


async def test_a_page_that_is_a_hole_since_it_was_lost_on_the_way_is_right_there() -> None:
    """It was read, and its digest taken, but never placed; nobody reads it again."""
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    everything = np.arange(PAGES)

    def on_event(event: Event) -> None:
        cut(event)
        if isinstance(event, StateChanged) and event.state is State.RECONNECTING:
            guest.write(everything, zero=True)
            guest.array.touched[0][everything] = False

    async with receiving() as receiver, asyncio.timeout(30):
        cut = cutting(receiver, [3 << 20])
        policy = Policy(bandwidth=8e6, **QUICK)  # type: ignore[arg-type]
        async with Migration(guest, receiver.address, policy, on_event=on_event) as migration:
            pass
        result = await migration.result()
    assert result.reconnects == 1
    assert result.verified == "digests"
    assert_moved(guest, receiver)


async def test_a_watch_that_strikes_when_the_guest_has_just_moved_spoils_nothing() -> None:
    guest = busy_guest()
    finish = Peer.finish
    strike = asyncio.Event()

    async def out_of_patience(self: SourceSession) -> None:
        await strike.wait()
        raise OutOfPatience("too late")

    async def and_strike(self: Peer, *what: Any) -> None:
        await finish(self, *what)
        strike.set()
        await asyncio.sleep(0)  # the watch fails: its group cancels us at the next thing that we wait for

    async with receiving() as receiver, asyncio.timeout(30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SourceSession, "_bound_pause", out_of_patience)
            patch.setattr(Peer, "finish", and_strike)
            async with Migration(guest, receiver.address, Policy(**QUICK)) as migration:  # type: ignore[arg-type]
                pass
        result = await migration.result()
    assert result.status == "completed"
    assert_moved(guest, receiver)


async def test_holes_are_not_read_after_a_return_either() -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(1000, 2000))
    async with receiving() as receiver, asyncio.timeout(30):
        policy = Policy(bandwidth=4e6, **QUICK)  # type: ignore[arg-type]
        async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1 << 20])) as migration:
            pass
        result = await migration.result()
    assert_moved(guest, receiver)
    assert result.reconnects == 1
    assert migration._session is not None
    assert migration._session.stats.pages_zero == 0, "zero bits were sent for holes"


async def test_a_guest_is_paused_in_vain_twice_at_most() -> None:
    guest = busy_guest()
    send = FramedConnection.send_message

    async def no_end(self: FramedConnection, message: Message) -> int:
        return 0 if isinstance(message, End) else await send(self, message)

    async with receiving() as receiver, asyncio.timeout(30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FramedConnection, "send_message", no_end)
            policy = Policy(**(QUICK | {"handover_timeout": 0.3}))  # type: ignore[arg-type]
            with pytest.raises(LinkLost, match="was not ready"):
                async with Migration(guest, receiver.address, policy):
                    pass
    assert guest.calls.count("pause") == 2
    assert_stayed(guest)


@pytest.mark.parametrize(
    ("address", "why"),
    [("ssh://hostb/web1", "ends with this connection"), ("file:/tmp/web1.snapshot", "can't be written to again")],
)
async def test_what_can_not_be_made_anew_says_why(address: str, why: str) -> None:
    assert why in open_destination(address, Policy()).no_return


async def test_an_older_amig_on_the_other_side_is_no_trouble() -> None:
    """Who does not know the feature is offered it, and does not hear of it again."""
    guest = busy_guest()
    async with receiving(keep=0) as receiver, Migration(guest, receiver.address, Policy(**QUICK)):  # type: ignore[arg-type]
        pass
    assert_moved(guest, receiver)
    assert receiver.inbound is not None
    assert receiver.inbound.hello is not None
    assert receiver.inbound.hello.features_optional == ("resume",)
    assert "resume" not in receiver.inbound.hello.features_required


@pytest.mark.parametrize(
    "lies",
    [
        [Held(region=0, first=0, pages=b"\xff" * 8 * 40), Resumed(migration=OTHER, rounds=0, token=bytes(32))],
        [Held(region=0, first=0, pages=b"\xff" * 8 * 46), Resumed(migration="", rounds=0, token=bytes(32))],
        [Held(region=5, first=0, pages=bytes(8))],
        [Resumed(migration="", rounds=1, token=bytes(32))],
        [Resumed(migration="", rounds=limits.MAX_ROUND, token=bytes(32))],
        [Placed(round=0)],
        [Running(migration=OTHER)],
    ],
    ids=["another", "not-sent", "no-region", "not-over", "never", "placed", "running"],
)
async def test_a_destination_that_lies_about_what_it_has_leaves_the_guest_here(lies: list[Message]) -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    listener = await listen("tcp://127.0.0.1:0")

    async def lie() -> None:
        liar = Liar(await listener.accept())
        await liar.greet()
        assert liar.hello is not None
        await liar.say(liar.welcome(features=(*liar.hello.features_required, "resume")))
        await liar.take(FrameType.BLOCK)
        liar.connection.abort()
        again = Liar(await listener.accept())
        try:
            assert isinstance(await again.link.receive(), Resume)
            for message in lies:
                mine = getattr(message, "migration", None) == ""
                await again.say(msgspec.structs.replace(message, migration=liar.migration) if mine else message)
            await again.listen()
        finally:
            again.connection.abort()

    lying = asyncio.create_task(lie())
    try:
        async with asyncio.timeout(30):
            with pytest.raises(PeerError):
                async with Migration(guest, listener.address, Policy(bandwidth=2e6, **QUICK)):  # type: ignore[arg-type]
                    pass
    finally:
        lying.cancel()
        await asyncio.gather(lying, return_exceptions=True)
        await listener.close()
    assert_stayed(guest)


# --- who may come back -----------------------------------------------------------------------------------------------


async def lost_to(receiver: Receiver, migration: Migration) -> Resume:
    """Wait until the destination waits for its source; return what that would say."""
    async with asyncio.timeout(10):
        while Phase.LOST not in receiver.phases:
            await asyncio.sleep(0.005)
    assert receiver.inbound is not None
    assert receiver.inbound._door is not None
    return Resume(migration=migration.id, token=receiver.inbound._door._token, since=0, round=9)


async def says(address: str, message: Message) -> Message | None:
    """Connect, say it, and return the answer."""
    link = FramedConnection(await Dialer(address).connect(timeout=5))
    try:
        await link.send_message(message)
        return await link.receive()
    except LinkLost:
        return None
    finally:
        link.abort()


@contextmanager
def coming_later() -> Iterator[asyncio.Event]:
    """A source that has lost its connection comes back only once the event is set."""
    held = asyncio.Event()
    resume = Peer.resume

    async def later(self: Peer, since: int, round_: int) -> Answer:
        await held.wait()
        return await resume(self, since, round_)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Peer, "resume", later)
        yield held


@pytest.mark.parametrize("wrong", ["token", "migration", "hello", "join", "garbage"])
async def test_others_are_refused_and_the_source_can_still_come_back(wrong: str) -> None:
    guest = busy_guest()
    refused: list[Message | None] = []

    async with receiving() as receiver, asyncio.timeout(30):
        with coming_later() as held:
            policy = Policy(bandwidth=8e6, **QUICK)  # type: ignore[arg-type]
            async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1])) as migration:
                right = await lost_to(receiver, migration)
                said: dict[str, Message] = {
                    "token": msgspec.structs.replace(right, token=bytes(32)),
                    "migration": msgspec.structs.replace(right, migration="f" * 32),
                    "hello": HELLO,
                    "join": Join(migration=migration.id, token=right.token, stream=1),
                    "garbage": Ping(seq=1, sent_ns=1),
                }
                refused.append(await says(receiver.address, said[wrong]))
                held.set()
        result = await migration.result()
    assert result.status == "completed"
    assert_moved(guest, receiver)
    assert refused == [None] or isinstance(refused[0], Refuse)


async def test_what_a_source_said_on_an_earlier_return_and_comes_late_changes_nothing() -> None:
    guest = busy_guest()
    send = FramedConnection.send_message
    said: list[Resume] = []
    late: list[asyncio.Task[Message | None]] = []

    async def noted(self: FramedConnection, message: Message) -> int:
        if isinstance(message, Resume):
            said.append(message)
        return await send(self, message)

    async with receiving() as receiver, asyncio.timeout(60):
        cut = cutting(receiver, [1 << 20])

        def on_event(event: Event) -> None:
            cut(event)
            if said and not late and isinstance(event, Progress) and event.bytes_sent >= 4 << 20:
                late.append(asyncio.create_task(says(receiver.address, said[0])))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FramedConnection, "send_message", noted)
            policy = Policy(bandwidth=4e6, **QUICK)  # type: ignore[arg-type]
            async with Migration(guest, receiver.address, policy, on_event=on_event) as migration:
                pass
        result = await migration.result()
        answer = await late[0]
    assert isinstance(answer, Refuse)
    assert answer.code == "stale"
    assert result.reconnects == 1
    assert_moved(guest, receiver)


async def test_a_return_that_turns_out_stale_only_when_all_is_placed_does_not_end_the_migration() -> None:
    guest = busy_guest()
    go_on = Placement.go_on
    stale: list[int] = []

    def once(self: Placement, since: int, round_: int) -> Answer:
        if not stale:
            stale.append(round_)
            raise PeerError("the source says that it began with another round")
        return go_on(self, since, round_)

    async def ends(self: Peer, since: int, round_: int) -> Answer:
        try:
            return await resume(self, since, round_)
        except Refused as error:  # what was refused is some other connection's word
            raise LinkLost(str(error)) from error

    resume = Peer.resume
    async with receiving() as receiver, asyncio.timeout(60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Placement, "go_on", once)
            patch.setattr(Peer, "resume", ends)
            policy = Policy(bandwidth=8e6, **QUICK)  # type: ignore[arg-type]
            async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1 << 20])):
                pass
    assert stale
    assert_moved(guest, receiver)


async def test_who_connects_and_says_nothing_keeps_no_source_waiting() -> None:
    guest = busy_guest()
    silent: list[Connection] = []
    async with receiving() as receiver, asyncio.timeout(60):
        with coming_later() as held, pytest.MonkeyPatch.context() as patch:
            patch.setattr(door, "PATIENCE", 1000.0)
            patch.setattr(door, "MAX_STRANGERS", 4)
            policy = Policy(bandwidth=8e6, **QUICK)  # type: ignore[arg-type]
            async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1])) as migration:
                await lost_to(receiver, migration)
                for _ in range(10):
                    silent.append(await Dialer(receiver.address).connect(timeout=5))  # noqa: PERF401
                held.set()
        result = await migration.result()
        for connection in silent:
            connection.abort()
    assert result.reconnects == 1
    assert_moved(guest, receiver)


async def test_another_migration_is_told_for_whom_the_guest_is_kept_and_what_to_do() -> None:
    guest = busy_guest()
    async with receiving(keep=1.0) as receiver, asyncio.timeout(30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Peer, "resume", nobody_there)
            policy = Policy(bandwidth=8e6, **(QUICK | {"reconnect": 0.5}))  # type: ignore[arg-type]
            with pytest.raises(LinkLost):
                async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1])) as migration:
                    await lost_to(receiver, migration)
                    answer = await says(receiver.address, HELLO)
    assert isinstance(answer, Refuse)
    assert answer.code == "busy"
    for words in ("kept here for a source that lost its connection", "s more", "amig stop"):
        assert words in answer.reason


async def test_a_source_that_gives_up_tells_a_destination_that_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else that would refuse everybody for as long as it keeps it."""
    guest = busy_guest()

    class Known(Records):
        async def outcome(self, migration: str) -> Outcome | None:
            return Outcome.DISCARDED

    async with receiving(keep=1000.0) as receiver, asyncio.timeout(30):
        receiver.records = Known()
        monkeypatch.setattr(Peer, "resume", nobody_there)

        def on_event(event: Event) -> None:
            cut(event)
            if isinstance(event, StateChanged) and event.state is State.RECONNECTING:
                migration.cancel()

        cut = cutting(receiver, [1])
        async with Migration(guest, receiver.address, Policy(bandwidth=8e6, **QUICK), on_event=on_event) as migration:  # type: ignore[arg-type]
            pass
        assert migration.cancelled
    assert isinstance(receiver.error, Asked)
    assert receiver.guest.calls[-1] == "discard"
    assert_stayed(guest)


async def test_a_destination_that_is_busy_for_a_moment_is_asked_again() -> None:
    """It tidies up after an attempt that was cancelled."""
    guest = busy_guest()
    listener = await listen("tcp://127.0.0.1:0")
    receiver = Receiver(ModelIncoming(), KEEP, deaf=False)

    async def first_busy() -> None:
        for _ in range(2):
            link = FramedConnection(await listener.accept())
            await link.receive()
            await link.send_message(Refuse(code="busy", reason="guest web1 is arriving here"))
            await link.close()
        await receiver.run(listener)

    running = asyncio.create_task(first_busy())
    try:
        async with asyncio.timeout(30), Migration(guest, listener.address, Policy(**QUICK)):  # type: ignore[arg-type]
            pass
        await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await listener.close()
    assert_moved(guest, receiver)


async def test_a_question_ends_the_waiting_durably() -> None:
    guest = busy_guest()
    asked: list[str] = []

    class Known(Records):
        async def outcome(self, migration: str) -> Outcome | None:
            asked.append(migration)
            return Outcome.DISCARDED

    async with receiving() as receiver, asyncio.timeout(30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Peer, "resume", nobody_there)
            policy = Policy(bandwidth=8e6, **(QUICK | {"reconnect": 1.0}))  # type: ignore[arg-type]
            with pytest.raises(LinkLost):
                async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1])) as migration:
                    await lost_to(receiver, migration)
                    assert receiver.inbound is not None
                    receiver.inbound._door._records = Known()  # type: ignore[union-attr]
                    assert isinstance(await says(receiver.address, Query(migration=migration.id)), Discarded)
    assert asked == [migration.id]
    assert isinstance(receiver.error, Asked)
    assert receiver.guest.calls[-1] == "discard"
    assert_stayed(guest)


async def nobody_there(self: Peer, since: int, round_: int) -> Answer:
    raise LinkLost("nobody is there")


async def test_stopping_the_receiver_while_it_waits_discards_what_came() -> None:
    guest = busy_guest()
    async with receiving() as receiver, asyncio.timeout(30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Peer, "resume", nobody_there)
            policy = Policy(bandwidth=8e6, **(QUICK | {"reconnect": 0.5}))  # type: ignore[arg-type]
            with pytest.raises(LinkLost):
                async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1])) as migration:
                    await lost_to(receiver, migration)
                    assert receiver.task is not None
                    receiver.task.cancel()
                    await asyncio.gather(receiver.task, return_exceptions=True)
                    receiver.task = asyncio.create_task(asyncio.sleep(0))
    assert receiver.guest.calls == ["build", "discard"]
    assert_stayed(guest)


# --- links that die again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Held, Resumed])
async def test_a_link_that_dies_silently_while_the_answer_is_told_holds_up_nobody_for_ever(
    kind: type[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = busy_guest()
    send = FramedConnection.send_message
    stuck: list[FramedConnection] = []

    async def swallowed(self: FramedConnection, message: Message) -> int:
        if isinstance(message, kind) and not stuck:
            stuck.append(self)
            await asyncio.get_running_loop().create_future()  # as when no window opens any more
        return await send(self, message)

    monkeypatch.setattr(FramedConnection, "send_message", swallowed)
    async with receiving() as receiver, asyncio.timeout(30):
        receiver.stall = 1.0
        policy = Policy(bandwidth=8e6, **(QUICK | {"connect_timeout": 1.0}))  # type: ignore[arg-type]
        async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [1 << 20])) as migration:
            pass
        result = await migration.result()
    assert stuck
    assert result.reconnects
    assert_moved(guest, receiver)


async def test_a_destination_may_say_for_long_what_it_has_as_long_as_it_says_something() -> None:
    guest = busy_guest()
    send = FramedConnection.send_message
    pause = 0.3

    async def slowly(self: FramedConnection, message: Message) -> int:
        if isinstance(message, Held | Resumed | Join):
            await asyncio.sleep(pause)
        return await send(self, message)

    async with receiving() as receiver, asyncio.timeout(30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FramedConnection, "send_message", slowly)
            patch.setattr(agreement, "_WORDS", 8)  # several messages for so small a guest
            policy = Policy(bandwidth=8e6, streams=2, **(QUICK | {"connect_timeout": 2 * pause}))  # type: ignore[arg-type]
            async with Migration(guest, receiver.address, policy, on_event=cutting(receiver, [2 << 20])) as migration:
                pass
        result = await migration.result()
    assert result.reconnects == 1
    assert_moved(guest, receiver)
