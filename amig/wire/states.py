"""States of both sides and the transitions between them, as data.

`SOURCE` and `DESTINATION` say which frames may be sent and received in each state and which state follows; `LOST` says
what a lost connection means there. A frame that the table does not name is an error: `LocalProtocolError` when we were
about to send it, `PeerError` when the peer did. One object stands for one connection: stream 0 of a migration, a
further stream (JOIN), a return after a lost one (RESUME), or a question about an old migration (QUERY); a snapshot file
has tables of its own, since it never answers.

A connection that is lost before COMMIT is over in any case. Whether the *migration* is, is not a matter of one
connection: with the feature ``resume`` it may go on over another, which begins with RESUME.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, Generic, NamedTuple, TypeVar

from amig.errors import PeerError
from amig.wire.frametype import FrameType

F = FrameType


class LocalProtocolError(RuntimeError):
    """Our side was about to break the protocol: a bug of amig, never the peer's fault."""


class Way(enum.StrEnum):
    """Which way a frame goes."""

    SEND = "send"
    RECEIVE = "receive"


class Event(NamedTuple):
    """A frame sent or received."""

    way: Way
    type: FrameType


class SourceState(enum.StrEnum):
    """What the source's end of a connection is doing."""

    IDLE = "idle"
    HELLO_SENT = "hello-sent"
    RESUMING = "resuming"
    """RESUME is sent: the guest runs; what the destination has is being told."""
    MEMORY = "memory"
    """The guest runs and its pages are being sent."""
    SWITCHOVER = "switchover"
    """The guest is paused; state has been sent, last pages may follow."""
    WAIT_PREPARED = "wait-prepared"
    """END is sent."""
    PREPARED = "prepared"
    """The destination could run; the last moment to turn back."""
    COMMITTED = "committed"
    """COMMIT is sent: only the destination can say now who runs the guest."""
    DONE = "done"
    """The destination runs it."""
    RETURNED = "returned"
    """The destination has durably let go: the source runs it."""
    REFUSED = "refused"
    ABORTED = "aborted"
    """Off before COMMIT: the source runs it. Frames that crossed the ABORT are dropped."""
    IN_DOUBT = "in-doubt"
    """Lost after COMMIT: the source must not run it before it has asked (QUERY)."""
    JOINING = "joining"
    STREAM = "stream"
    """A further connection that carries blocks."""
    ASKED = "asked"
    """QUERY is sent."""
    LOST = "lost"
    """A connection that promised nothing has gone."""


class DestinationState(enum.StrEnum):
    """What the destination's end of a connection is doing."""

    IDLE = "idle"
    HELLO_RECEIVED = "hello-received"
    RESUMING = "resuming"
    MEMORY = "memory"
    SWITCHOVER = "switchover"
    END_RECEIVED = "end-received"
    """Everything has come; being verified and loaded."""
    PREPARED = "prepared"
    """Promised to run the guest if COMMIT comes; until then it must be ready to, and must not."""
    COMMITTED = "committed"
    """COMMIT has come: the guest is ours to run, whatever becomes of the connection."""
    DONE = "done"
    """RUNNING is durable and sent."""
    DISCARDED = "discarded"
    """Durably let go after PREPARED; a COMMIT that crossed it is answered by it."""
    REFUSED = "refused"
    ABORTED = "aborted"
    """Off before PREPARED, or by the source's ABORT: all that came is thrown away."""
    UNDECIDED = "undecided"
    """Lost between PREPARED and COMMIT: must be made DISCARDED durably before anything else, and never run."""
    JOINING = "joining"
    STREAM = "stream"
    ASKED = "asked"
    LOST = "lost"


class SnapshotState(enum.StrEnum):
    """Writing or reading a snapshot file."""

    IDLE = "idle"
    MEMORY = "memory"
    SWITCHOVER = "switchover"
    DONE = "done"
    LOST = "lost"


S = TypeVar("S", bound=enum.StrEnum)
Table = Mapping[S, Mapping[Event, S]]


def _on(way: Way, state: S, *types: FrameType) -> dict[Event, S]:
    return {Event(way, kind): state for kind in types}


def _send(state: S, *types: FrameType) -> dict[Event, S]:
    return _on(Way.SEND, state, *types)


def _receive(state: S, *types: FrameType) -> dict[Event, S]:
    return _on(Way.RECEIVE, state, *types)


def _pings(state: S) -> dict[Event, S]:
    return _send(state, F.PING, F.PONG) | _receive(state, F.PING, F.PONG)


_S = SourceState
SOURCE: Final[Table[SourceState]] = {
    _S.IDLE: _send(_S.HELLO_SENT, F.HELLO)
    | _send(_S.JOINING, F.JOIN)
    | _send(_S.ASKED, F.QUERY)
    | _send(_S.RESUMING, F.RESUME),
    _S.HELLO_SENT: _receive(_S.MEMORY, F.WELCOME)
    | _receive(_S.REFUSED, F.REFUSE)
    | _send(_S.ABORTED, F.ABORT)
    | _pings(_S.HELLO_SENT),
    _S.MEMORY: _send(_S.MEMORY, F.BLOCK, F.ROUND)
    | _receive(_S.MEMORY, F.PLACED)
    | _send(_S.SWITCHOVER, F.STATE)
    | _send(_S.ABORTED, F.ABORT)
    | _receive(_S.ABORTED, F.ABORT)
    | _pings(_S.MEMORY),
    _S.SWITCHOVER: _send(_S.SWITCHOVER, F.STATE, F.BLOCK, F.ROUND, F.DIGESTS)
    | _receive(_S.SWITCHOVER, F.PLACED)
    | _send(_S.WAIT_PREPARED, F.END)
    | _send(_S.ABORTED, F.ABORT)
    | _receive(_S.ABORTED, F.ABORT)
    | _pings(_S.SWITCHOVER),
    _S.WAIT_PREPARED: _receive(_S.WAIT_PREPARED, F.PLACED)
    | _receive(_S.PREPARED, F.PREPARED)
    | _send(_S.ABORTED, F.ABORT)
    | _receive(_S.ABORTED, F.ABORT)
    | _pings(_S.WAIT_PREPARED),
    _S.PREPARED: _send(_S.COMMITTED, F.COMMIT)
    | _send(_S.ABORTED, F.ABORT)
    | _receive(_S.RETURNED, F.DISCARDED)
    | _pings(_S.PREPARED),
    _S.COMMITTED: _receive(_S.DONE, F.RUNNING) | _receive(_S.RETURNED, F.DISCARDED) | _pings(_S.COMMITTED),
    _S.DONE: _pings(_S.DONE),
    _S.RETURNED: _send(_S.RETURNED, F.PING) | _receive(_S.RETURNED, F.PING, F.PONG),
    _S.REFUSED: {},
    _S.ABORTED: _receive(_S.ABORTED, F.WELCOME, F.REFUSE, F.PLACED, F.PREPARED, F.DISCARDED, F.ABORT, F.PING, F.PONG)
    | _receive(_S.ABORTED, F.HELD, F.RESUMED),
    _S.IN_DOUBT: {},
    _S.JOINING: _receive(_S.STREAM, F.JOINED) | _receive(_S.REFUSED, F.REFUSE),
    _S.STREAM: _send(_S.STREAM, F.BLOCK, F.ROUND),
    _S.ASKED: _receive(_S.DONE, F.RUNNING) | _receive(_S.RETURNED, F.DISCARDED) | _receive(_S.REFUSED, F.REFUSE),
    _S.RESUMING: _receive(_S.RESUMING, F.HELD)
    | _receive(_S.MEMORY, F.RESUMED)
    | _receive(_S.REFUSED, F.REFUSE)
    | _send(_S.ABORTED, F.ABORT),
    _S.LOST: {},
}

SOURCE_LOST: Final[Mapping[SourceState, SourceState]] = {
    _S.IDLE: _S.LOST,
    _S.HELLO_SENT: _S.ABORTED,
    _S.MEMORY: _S.ABORTED,
    _S.SWITCHOVER: _S.ABORTED,
    _S.WAIT_PREPARED: _S.ABORTED,
    _S.PREPARED: _S.ABORTED,
    _S.COMMITTED: _S.IN_DOUBT,
    _S.DONE: _S.DONE,
    _S.RETURNED: _S.RETURNED,
    _S.REFUSED: _S.REFUSED,
    _S.ABORTED: _S.ABORTED,
    _S.IN_DOUBT: _S.IN_DOUBT,
    _S.JOINING: _S.LOST,
    _S.STREAM: _S.LOST,
    _S.ASKED: _S.IN_DOUBT,
    _S.RESUMING: _S.ABORTED,
    _S.LOST: _S.LOST,
}

_D = DestinationState
DESTINATION: Final[Table[DestinationState]] = {
    _D.IDLE: _receive(_D.HELLO_RECEIVED, F.HELLO)
    | _receive(_D.JOINING, F.JOIN)
    | _receive(_D.ASKED, F.QUERY)
    | _receive(_D.RESUMING, F.RESUME)
    | _send(_D.REFUSED, F.REFUSE),
    _D.HELLO_RECEIVED: _send(_D.MEMORY, F.WELCOME)
    | _send(_D.REFUSED, F.REFUSE)
    | _receive(_D.ABORTED, F.ABORT)
    | _pings(_D.HELLO_RECEIVED),
    _D.MEMORY: _receive(_D.MEMORY, F.BLOCK, F.ROUND)
    | _send(_D.MEMORY, F.PLACED)
    | _receive(_D.SWITCHOVER, F.STATE)
    | _send(_D.ABORTED, F.ABORT)
    | _receive(_D.ABORTED, F.ABORT)
    | _pings(_D.MEMORY),
    _D.SWITCHOVER: _receive(_D.SWITCHOVER, F.STATE, F.BLOCK, F.ROUND, F.DIGESTS)
    | _send(_D.SWITCHOVER, F.PLACED)
    | _receive(_D.END_RECEIVED, F.END)
    | _send(_D.ABORTED, F.ABORT)
    | _receive(_D.ABORTED, F.ABORT)
    | _pings(_D.SWITCHOVER),
    _D.END_RECEIVED: _send(_D.END_RECEIVED, F.PLACED)
    | _send(_D.PREPARED, F.PREPARED)
    | _send(_D.ABORTED, F.ABORT)
    | _receive(_D.ABORTED, F.ABORT)
    | _pings(_D.END_RECEIVED),
    _D.PREPARED: _receive(_D.COMMITTED, F.COMMIT)
    | _receive(_D.ABORTED, F.ABORT)
    | _send(_D.DISCARDED, F.DISCARDED)
    | _pings(_D.PREPARED),
    _D.COMMITTED: _send(_D.DONE, F.RUNNING) | _send(_D.DISCARDED, F.DISCARDED) | _pings(_D.COMMITTED),
    _D.DONE: _pings(_D.DONE),
    _D.DISCARDED: _receive(_D.DISCARDED, F.COMMIT, F.ABORT, F.PING, F.PONG),
    _D.REFUSED: _receive(_D.REFUSED, F.ABORT, F.PING, F.PONG),
    _D.ABORTED: _receive(_D.ABORTED, F.BLOCK, F.ROUND, F.STATE, F.DIGESTS, F.END, F.ABORT, F.PING, F.PONG),
    _D.UNDECIDED: {},
    _D.JOINING: _send(_D.STREAM, F.JOINED) | _send(_D.REFUSED, F.REFUSE),
    _D.STREAM: _receive(_D.STREAM, F.BLOCK, F.ROUND),
    _D.ASKED: _send(_D.DONE, F.RUNNING) | _send(_D.DISCARDED, F.DISCARDED) | _send(_D.REFUSED, F.REFUSE),
    _D.RESUMING: _send(_D.RESUMING, F.HELD)
    | _send(_D.MEMORY, F.RESUMED)
    | _send(_D.REFUSED, F.REFUSE)
    | _receive(_D.ABORTED, F.ABORT),
    _D.LOST: {},
}

DESTINATION_LOST: Final[Mapping[DestinationState, DestinationState]] = {
    _D.IDLE: _D.LOST,
    _D.HELLO_RECEIVED: _D.ABORTED,
    _D.MEMORY: _D.ABORTED,
    _D.SWITCHOVER: _D.ABORTED,
    _D.END_RECEIVED: _D.ABORTED,
    _D.PREPARED: _D.UNDECIDED,
    _D.COMMITTED: _D.COMMITTED,
    _D.DONE: _D.DONE,
    _D.DISCARDED: _D.DISCARDED,
    _D.REFUSED: _D.REFUSED,
    _D.ABORTED: _D.ABORTED,
    _D.UNDECIDED: _D.UNDECIDED,
    _D.JOINING: _D.LOST,
    _D.STREAM: _D.LOST,
    _D.ASKED: _D.LOST,
    _D.RESUMING: _D.ABORTED,
    _D.LOST: _D.LOST,
}

_N = SnapshotState


def _snapshot(way: Way) -> Table[SnapshotState]:
    return {
        _N.IDLE: _on(way, _N.MEMORY, F.HELLO),
        _N.MEMORY: _on(way, _N.MEMORY, F.BLOCK, F.ROUND) | _on(way, _N.SWITCHOVER, F.STATE),
        _N.SWITCHOVER: _on(way, _N.SWITCHOVER, F.STATE, F.BLOCK, F.ROUND, F.DIGESTS) | _on(way, _N.DONE, F.END),
        _N.DONE: {},
        _N.LOST: {},
    }


SNAPSHOT_WRITER: Final = _snapshot(Way.SEND)
SNAPSHOT_READER: Final = _snapshot(Way.RECEIVE)
SNAPSHOT_LOST: Final = {state: _N.DONE if state is _N.DONE else _N.LOST for state in _N}


class Protocol(Generic[S]):
    """One end of one connection: where it stands, and what may come next."""

    def __init__(self, side: str, start: S, table: Table[S], lost: Mapping[S, S]) -> None:
        self._side = side
        self._state: S = start
        self._table = table
        self._lost = lost
        self.ended = False
        """Whether the connection is known to have gone."""

    @property
    def state(self) -> S:
        """Where this end stands."""
        return self._state

    def may_send(self, kind: FrameType) -> bool:
        """Whether this side may send such a frame now."""
        return Event(Way.SEND, kind) in self._table[self._state]

    def sent(self, kind: FrameType) -> S:
        """Note a frame about to be sent and return the new state; raises `LocalProtocolError`."""
        after = self._table[self._state].get(Event(Way.SEND, kind))
        if after is None:
            raise LocalProtocolError(f"the {self._side} was about to send {kind.name} in state {self._state}")
        self._state = after
        return after

    def received(self, kind: FrameType) -> S:
        """Note a frame that came and return the new state; raises `PeerError`."""
        after = self._table[self._state].get(Event(Way.RECEIVE, kind))
        if after is None:
            wanted = ", ".join(e.type.name for e in self._table[self._state] if e.way is Way.RECEIVE) or "nothing"
            raise PeerError(
                f"the peer sent {kind.name} while the {self._side} is in state {self._state} and expects {wanted}"
            )
        self._state = after
        return after

    def lost(self) -> S:
        """Note that the connection has gone and return the new state."""
        self.ended = True
        self._state = self._lost[self._state]
        return self._state


class SourceProtocol(Protocol[SourceState]):
    """The source's end of a connection."""

    def __init__(self) -> None:
        super().__init__("source", _S.IDLE, SOURCE, SOURCE_LOST)


class DestinationProtocol(Protocol[DestinationState]):
    """The destination's end of a connection."""

    def __init__(self) -> None:
        super().__init__("destination", _D.IDLE, DESTINATION, DESTINATION_LOST)


class SnapshotWriterProtocol(Protocol[SnapshotState]):
    """Writing a snapshot."""

    def __init__(self) -> None:
        super().__init__("snapshot writer", _N.IDLE, SNAPSHOT_WRITER, SNAPSHOT_LOST)


class SnapshotReaderProtocol(Protocol[SnapshotState]):
    """Reading a snapshot."""

    def __init__(self) -> None:
        super().__init__("snapshot reader", _N.IDLE, SNAPSHOT_READER, SNAPSHOT_LOST)
