"""Which faults are played, derived from the tables of states: every frame that may be sent, in every state.

A *send* is (side, state, frame type): an entry of `SOURCE` or `DESTINATION` with ``Way.SEND``. Each stands either in
`SCENARIO_OF`, which says what makes it happen, or in `NEVER`, which says why it does not. A new state or frame stands
in neither, and tests/faults/test_connection.py fails until it does.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from amig.wire.frametype import FrameType as F
from amig.wire.states import DESTINATION, SOURCE, DestinationState, SourceState, Way

S, D = SourceState, DestinationState


class Send(NamedTuple):
    """A frame that one side sends in one state."""

    side: str
    state: str
    type: F

    def __str__(self) -> str:
        return f"{self.side}-{self.state}-{self.type.name}"


def source(state: SourceState, *types: F) -> list[Send]:
    return [Send("source", state, kind) for kind in types]


def destination(state: DestinationState, *types: F) -> list[Send]:
    return [Send("destination", state, kind) for kind in types]


def sends(table: Mapping, side: str) -> Iterator[Send]:  # type: ignore[type-arg]
    for state, events in table.items():
        for event in events:
            if event.way is Way.SEND:
                yield Send(side, state, event.type)


def all_sends() -> set[Send]:
    return {*sends(SOURCE, "source"), *sends(DESTINATION, "destination")}


SCENARIO_OF: Final[dict[Send, str]] = {
    send: scenario
    for scenario, group in {
        "move": source(S.IDLE, F.HELLO)
        + source(S.MEMORY, F.PING, F.BLOCK, F.ROUND, F.STATE)
        + source(S.SWITCHOVER, F.END)
        + source(S.PREPARED, F.COMMIT)
        + source(S.DONE, F.PING)
        + destination(D.HELLO_RECEIVED, F.WELCOME)
        + destination(D.MEMORY, F.PONG, F.PLACED)
        + destination(D.END_RECEIVED, F.PREPARED)
        + destination(D.COMMITTED, F.RUNNING),
        "streams": source(S.IDLE, F.JOIN) + source(S.STREAM, F.BLOCK, F.ROUND) + destination(D.JOINING, F.JOINED),
        "hashed-again": source(S.SWITCHOVER, F.DIGESTS),
        "stranger": destination(D.JOINING, F.REFUSE),
        "refused": destination(D.HELLO_RECEIVED, F.REFUSE),
        "placed-in-switchover": destination(D.SWITCHOVER, F.PLACED),
        "placed-after-end": destination(D.END_RECEIVED, F.PLACED),
        "cancelled-at-hello": source(S.HELLO_SENT, F.ABORT),
        "cancelled-in-memory": source(S.MEMORY, F.ABORT),
        "cancelled-in-switchover": source(S.SWITCHOVER, F.ABORT),
        "cancelled-after-end": source(S.WAIT_PREPARED, F.ABORT),
        "cancelled-at-the-last-moment": source(S.PREPARED, F.ABORT),
        "no-memory-there": destination(D.MEMORY, F.ABORT),
        "receiver-stopped": destination(D.SWITCHOVER, F.ABORT),
        "state-does-not-fit": destination(D.END_RECEIVED, F.ABORT),
        "commit-comes-late": destination(D.PREPARED, F.DISCARDED),
        "commit-fails-there": destination(D.COMMITTED, F.DISCARDED),
        "come-back": source(S.IDLE, F.RESUME) + destination(D.RESUMING, F.HELD, F.RESUMED),
        "come-back-too-late": destination(D.RESUMING, F.REFUSE),
        "cancelled-coming-back": source(S.RESUMING, F.ABORT),
        "idle": source(S.MEMORY, F.PONG) + destination(D.MEMORY, F.PING),
        "idle-in-switchover": source(S.SWITCHOVER, F.PING, F.PONG) + destination(D.SWITCHOVER, F.PING, F.PONG),
        "idle-until-end": source(S.WAIT_PREPARED, F.PONG),
        "asked-running": source(S.IDLE, F.QUERY) + destination(D.ASKED, F.RUNNING),
        "asked-discarded": source(S.RETURNED, F.PING) + destination(D.ASKED, F.DISCARDED),
        "asked-unknown": destination(D.ASKED, F.REFUSE),
    }.items()
    for send in group
}

_PING = "PING measures the round trip before memory, keeps alive until END, and confirms an answer; never else"
CROSSED = "sent in switchover, before END was read there, or in answer to that: the relay may see it later"
_LAST = "device state is the last thing sent before END, when all pages have gone"
NEVER: Final[dict[Send, str]] = {
    send: why
    for why, group in {
        _PING: source(S.HELLO_SENT, F.PING, F.PONG)
        + source(S.WAIT_PREPARED, F.PING)
        + source(S.PREPARED, F.PING)
        + source(S.COMMITTED, F.PING, F.PONG)
        + source(S.DONE, F.PONG)
        + destination(D.HELLO_RECEIVED, F.PING, F.PONG)
        + destination(D.PREPARED, F.PING, F.PONG)
        + destination(D.COMMITTED, F.PING, F.PONG)
        + destination(D.DONE, F.PING, F.PONG),
        CROSSED: destination(D.END_RECEIVED, F.PING, F.PONG) + source(S.PREPARED, F.PONG),
        _LAST: source(S.SWITCHOVER, F.STATE, F.BLOCK, F.ROUND),
        "a frame is read before it is refused": destination(D.IDLE, F.REFUSE),
    }.items()
    for send in group
}


ANEW: Final = "anew-"
"""Before a scenario's name: the same, but a connection that is lost is made anew."""

_GOES_ON: Final = {
    "source": (S.MEMORY, S.SWITCHOVER, S.JOINING, S.STREAM),
    "destination": (D.MEMORY, D.SWITCHOVER, D.JOINING, D.STREAM),
}


class Action(enum.StrEnum):
    """What happens to the connection."""

    CUT = "cut"
    """Both directions end in order (FIN)."""
    RESET = "reset"
    """Both directions are reset: what was not read yet is lost."""
    HALF = "half"
    """The frame's direction ends, the other goes on."""
    STALL = "stall"
    """Nothing passes for a while, then everything does."""
    SILENCE = "silence"
    """Nothing passes any more, and nobody is told: a cable that was pulled."""


class Position(enum.StrEnum):
    """Where in the frame."""

    BEFORE = "before"
    HEADER = "header"
    PAYLOAD = "payload"
    AFTER = "after"


class Case(NamedTuple):
    """One fault at the first frame of its kind, in a scenario that brings it about."""

    send: Send
    action: Action
    position: Position
    scenario: str
    nth: int = 0

    def __str__(self) -> str:
        return f"{self.send}-{self.action}-{self.position}" + (f"-{self.nth}" if self.nth else "")


POSITIONS: Final = {
    Action.STALL: (Position.HEADER, Position.AFTER),
    Action.SILENCE: (Position.BEFORE, Position.PAYLOAD, Position.AFTER),
}


def all_cases() -> list[Case]:
    """Return every frame in every state with every action at every position."""
    return [
        Case(send, action, position, scenario)
        for send, scenario in SCENARIO_OF.items()
        for action in Action
        for position in POSITIONS.get(action, tuple(Position))
    ]


def one_each() -> list[Case]:
    """Return one case for each send; actions and positions take turns."""
    cases: list[Case] = []
    for index, (send, scenario) in enumerate(SCENARIO_OF.items()):
        action = (Action.CUT, Action.HALF, Action.RESET, Action.CUT, Action.STALL)[index % 5]
        places = POSITIONS.get(action, tuple(Position))
        cases.append(Case(send, action, places[index % len(places)], scenario))
    return cases


def anew_cases() -> list[Case]:
    """Return what happens to connections that can be made anew: every frame of memory and switchover, every way."""
    return [
        Case(send, action, position, ANEW + scenario)
        for send, scenario in SCENARIO_OF.items()
        if scenario in ("move", "streams", "hashed-again") and send.state in _GOES_ON[send.side]
        for action in Action
        for position in POSITIONS.get(action, tuple(Position))
    ]


_PROMISED = (S.PREPARED, S.COMMITTED, S.DONE, S.RETURNED, D.PREPARED, D.COMMITTED, D.DONE, D.DISCARDED)
"""From PREPARED on a lost connection is settled by a question, and may be settled by DISCARDED."""


def goes_on(case: Case) -> bool:
    """Whether the guest must have moved after this.

    Not with a connection that was lost before both sides had agreed, or when the destination has everything and begins
    to load it, or may have, for all that the source knows.
    """
    agreed = case.send.state not in (S.JOINING, D.JOINING)
    ended = case.send.type is F.END and case.position is Position.AFTER
    promised = case.send.type is F.PREPARED or case.send.state in _PROMISED
    return case.scenario.startswith(ANEW) and agreed and not ended and not promised


def random_cases(seed: int, count: int) -> list[Case]:
    """Return cases at later frames of a kind, too."""
    dice = random.Random(seed)
    found = sorted(SCENARIO_OF.items())
    cases: list[Case] = []
    for _ in range(count):
        send, scenario = dice.choice(found)
        repeats = send.type in (F.BLOCK, F.ROUND, F.PLACED) and scenario in ("move", "streams")
        if scenario in ("move", "streams") and dice.randrange(2):
            scenario = ANEW + scenario
        action = dice.choice(list(Action))
        cases.append(Case(send, action, dice.choice(list(Position)), scenario, dice.randrange(3) if repeats else 0))
    return cases
