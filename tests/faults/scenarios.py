"""What brings a migration to the point where a fault is to strike: one function for each scenario of cases.py."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from amig.host.handover import Records
from amig.session import inbound, peer
from amig.session.inbound import Phase
from amig.transport.framed import FramedConnection
from amig.wire.frametype import FrameType as F
from amig.wire.messages import Join, Message, Prepared
from amig.wire.states import DestinationState, SourceState
from tests.faults.cases import ANEW, Action, Case, Position, Send
from tests.faults.relay import Relay
from tests.faults.world import PATIENCE, World
from tests.moving import until

Scenario = Callable[[World, pytest.MonkeyPatch], Awaitable[None]]
S, D = SourceState, DestinationState


def at_source(state: SourceState, kind: F) -> Send:
    return Send("source", state, kind)


def at_destination(state: DestinationState, kind: F) -> Send:
    return Send("destination", state, kind)


FIRST_FAULT: dict[str, Case] = {
    "asked-running": Case(at_destination(D.COMMITTED, F.RUNNING), Action.CUT, Position.BEFORE, "asked-running"),
    "asked-discarded": Case(at_source(S.PREPARED, F.COMMIT), Action.CUT, Position.BEFORE, "asked-discarded"),
    "come-back": Case(at_source(S.MEMORY, F.BLOCK), Action.CUT, Position.AFTER, "come-back", 2),
    "come-back-too-late": Case(at_source(S.MEMORY, F.BLOCK), Action.CUT, Position.AFTER, "come-back-too-late", 2),
    "cancelled-coming-back": Case(at_source(S.MEMORY, F.BLOCK), Action.CUT, Position.AFTER, "cancelled-coming-back", 2),
    "asked-unknown": Case(at_destination(D.COMMITTED, F.RUNNING), Action.CUT, Position.BEFORE, "asked-unknown"),
}
"""The fault that a scenario itself begins with."""


async def move(here: World, patch: pytest.MonkeyPatch) -> None:
    """A guest moves."""


async def streams(here: World, patch: pytest.MonkeyPatch) -> None:
    """Over three connections."""
    here.policy = dataclasses.replace(here.policy, streams=3)


async def hashed_again(here: World, patch: pytest.MonkeyPatch) -> None:
    """With all memory hashed again while it is paused."""
    here.policy = dataclasses.replace(here.policy, verify="full")


async def stranger(here: World, patch: pytest.MonkeyPatch) -> None:
    """Somebody else comes with JOIN while the destination waits for the source's."""
    await streams(here, patch)

    async def intrude() -> None:
        await asyncio.wait([asyncio.ensure_future(_join(here.relay))])

    here.relay.on(at_source(S.IDLE, F.JOIN), intrude)


async def _join(relay: Relay) -> None:
    from amig.errors import AmigError
    from amig.transport import Dialer
    from amig.wire.states import SourceProtocol

    try:
        async with asyncio.timeout(PATIENCE / 2):
            link = FramedConnection(await Dialer(relay.address).connect(timeout=1), SourceProtocol())
            try:
                await link.send_message(Join(migration="0" * 32, token=bytes(32), stream=1))
                await link.receive()
            finally:
                link.abort()
    except (AmigError, TimeoutError, OSError):
        pass


def fails(step: str) -> Scenario:
    async def scenario(here: World, patch: pytest.MonkeyPatch) -> None:
        here.fail_at(step)

    return scenario


def placed_in(state: DestinationState) -> Scenario:
    """PLACED is slow: it goes only in ``state``, or after a moment."""

    async def scenario(here: World, patch: pytest.MonkeyPatch) -> None:
        placed = inbound.Inbound._placed

        async def late(self: inbound.Inbound, round_: int) -> None:
            for _ in range(40):
                if self._protocol.state == state:
                    break
                await asyncio.sleep(0.005)
            await placed(self, round_)

        patch.setattr(inbound.Inbound, "_placed", late)
        if state is D.SWITCHOVER:

            async def wait() -> None:
                await here.relay.saw(at_destination(D.SWITCHOVER, F.PLACED))

            here.relay.on(at_source(S.SWITCHOVER, F.END), wait)

    return scenario


def cancelled_at(send: Send) -> Scenario:
    """The operator cancels when this frame is on its way."""

    async def scenario(here: World, patch: pytest.MonkeyPatch) -> None:
        here.relay.on(send, here.cancel)

    return scenario


async def cancelled_in_switchover(here: World, patch: pytest.MonkeyPatch) -> None:
    """The operator cancels between STATE and END."""
    send_state = FramedConnection.send_state

    async def slow(self: FramedConnection, content: bytes) -> int:
        size = await send_state(self, content)
        await here.cancel()
        return size

    patch.setattr(peer.FramedConnection, "send_state", slow)


async def cancelled_at_the_last_moment(here: World, patch: pytest.MonkeyPatch) -> None:
    """The operator cancels when PREPARED has come and COMMIT has not gone."""
    handle = peer.Peer._handle

    async def late(self: peer.Peer, message: Message) -> None:
        await handle(self, message)
        if isinstance(message, Prepared) and here.migration is not None:
            here.migration.cancel()

    patch.setattr(peer.Peer, "_handle", late)


async def receiver_stopped(here: World, patch: pytest.MonkeyPatch) -> None:
    """`amig receive` is ended between STATE and END."""
    here.relay.on(at_source(S.SWITCHOVER, F.END), here.stop_receiver)


async def commit_comes_late(here: World, patch: pytest.MonkeyPatch) -> None:
    """COMMIT is on its way for so long that the destination gives up waiting."""

    async def wait() -> None:
        await here.relay.saw(at_destination(D.PREPARED, F.DISCARDED), 2 * PATIENCE)

    patch.setattr(inbound, "COMMIT_TIMEOUT", PATIENCE / 3)
    here.policy = dataclasses.replace(here.policy, handover_timeout=2 * PATIENCE)
    here.relay.on(at_source(S.PREPARED, F.COMMIT), wait)


async def come_back(here: World, patch: pytest.MonkeyPatch) -> None:
    """A connection that is lost is made anew."""
    here.reconnects()


async def come_back_too_late(here: World, patch: pytest.MonkeyPatch) -> None:
    """The destination has thrown away what came when the source is back."""
    here.reconnects(keep=0.05)

    async def wait() -> None:
        await until(lambda: Phase.DISCARDED in here.phases, "the destination has lost patience")

    here.relay.on(at_source(S.IDLE, F.RESUME), wait)


async def cancelled_coming_back(here: World, patch: pytest.MonkeyPatch) -> None:
    """The operator cancels when the destination is about to say what it has."""
    here.reconnects()
    here.relay.on(at_destination(D.RESUMING, F.HELD), here.cancel)


def anew(scenario: Scenario) -> Scenario:
    """The same, but a connection that is lost is made anew."""

    async def again(here: World, patch: pytest.MonkeyPatch) -> None:
        await scenario(here, patch)
        here.reconnects()

    return again


async def idle(here: World, patch: pytest.MonkeyPatch) -> None:
    """No page comes for so long that the destination asks whether the source is still there."""
    here.pings()

    async def wait() -> None:
        await here.relay.saw(at_destination(D.MEMORY, F.PING), PATIENCE)

    here.relay.on(at_source(S.MEMORY, F.BLOCK), wait)


async def idle_in_switchover(here: World, patch: pytest.MonkeyPatch) -> None:
    """Both ask between STATE and END."""
    here.pings()
    send_state = FramedConnection.send_state

    async def slow(self: FramedConnection, content: bytes) -> int:
        size = await send_state(self, content)
        for send in (at_source(S.SWITCHOVER, F.PONG), at_destination(D.SWITCHOVER, F.PONG)):
            await here.relay.saw(send, PATIENCE / 2)
        return size

    patch.setattr(peer.FramedConnection, "send_state", slow)


async def idle_until_end(here: World, patch: pytest.MonkeyPatch) -> None:
    """The destination's question comes when END has gone out."""
    await idle_in_switchover(here, patch)

    async def wait() -> None:
        await here.relay.saw(at_source(S.SWITCHOVER, F.END))

    here.relay.on(at_destination(D.SWITCHOVER, F.PING), wait)


async def asked_unknown(here: World, patch: pytest.MonkeyPatch) -> None:
    """The destination has lost its records when it is asked."""
    here.operator_decides = True

    async def lose(*_: Any) -> None:
        for path in Records().root.glob("*.destination"):
            path.unlink()

    here.relay.on(at_source(S.IDLE, F.QUERY), lose)


SCENARIOS: dict[str, Scenario] = {
    "move": move,
    "streams": streams,
    "hashed-again": hashed_again,
    "stranger": stranger,
    "refused": fails("build"),
    "placed-in-switchover": placed_in(D.SWITCHOVER),
    "placed-after-end": placed_in(D.END_RECEIVED),
    "cancelled-at-hello": cancelled_at(at_destination(D.HELLO_RECEIVED, F.WELCOME)),
    "cancelled-in-memory": cancelled_at(at_source(S.MEMORY, F.BLOCK)),
    "cancelled-in-switchover": cancelled_in_switchover,
    "cancelled-after-end": cancelled_at(at_destination(D.END_RECEIVED, F.PREPARED)),
    "cancelled-at-the-last-moment": cancelled_at_the_last_moment,
    "no-memory-there": fails("pages"),
    "receiver-stopped": receiver_stopped,
    "state-does-not-fit": fails("load"),
    "commit-comes-late": commit_comes_late,
    "commit-fails-there": fails("commit"),
    "come-back": come_back,
    "come-back-too-late": come_back_too_late,
    "cancelled-coming-back": cancelled_coming_back,
    "idle": idle,
    "idle-in-switchover": idle_in_switchover,
    "idle-until-end": idle_until_end,
    "asked-running": move,
    "asked-discarded": move,
    "asked-unknown": asked_unknown,
}
SCENARIOS |= {ANEW + name: anew(SCENARIOS[name]) for name in ("move", "streams", "hashed-again")}
