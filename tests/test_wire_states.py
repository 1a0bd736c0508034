"""States and transitions: one table of courses drives both ends, and everything not in the tables is an error."""

from collections import deque

import pytest

from amig.errors import PeerError
from amig.wire import states
from amig.wire.frametype import FrameType as F
from amig.wire.states import (
    DestinationProtocol,
    DestinationState,
    Event,
    LocalProtocolError,
    SnapshotReaderProtocol,
    SnapshotState,
    SnapshotWriterProtocol,
    SourceProtocol,
    SourceState,
    Way,
)

S, D, N = SourceState, DestinationState, SnapshotState

MEMORY = "> HELLO, < WELCOME, > BLOCK, > ROUND, < PLACED, > BLOCK, > ROUND"
END = f"{MEMORY}, > STATE, > BLOCK, > ROUND, > END, < PLACED, < PLACED"
COURSES = {
    "the whole way": (f"{END}, < PREPARED, > COMMIT, < RUNNING", S.DONE, D.DONE),
    "state in parts": (f"{MEMORY}, > STATE, > STATE, > STATE, > END", S.WAIT_PREPARED, D.END_RECEIVED),
    "all memory hashed again": (f"{MEMORY}, > STATE, > DIGESTS, > DIGESTS, > END", S.WAIT_PREPARED, D.END_RECEIVED),
    "pings all along": (
        "> HELLO, > PING, < PONG, < WELCOME, < PING, > PONG, > STATE, > PING, < PONG, > END, < PING, > PONG, "
        "< PREPARED, > PING, < PONG, > COMMIT, < PING, > PONG, < RUNNING, > PING, < PONG",
        S.DONE,
        D.DONE,
    ),
    "refused": ("> HELLO, < REFUSE", S.REFUSED, D.REFUSED),
    "cancelled at the handshake": ("> HELLO, > ABORT", S.ABORTED, D.ABORTED),
    "cancelled in memory": (f"{MEMORY}, > ABORT", S.ABORTED, D.ABORTED),
    "cancelled in switchover": (f"{MEMORY}, > STATE, > ABORT", S.ABORTED, D.ABORTED),
    "cancelled after END": (f"{END}, > ABORT", S.ABORTED, D.ABORTED),
    "cancelled at the last moment": (f"{END}, < PREPARED, > ABORT", S.ABORTED, D.ABORTED),
    "destination fails in memory": (f"{MEMORY}, < ABORT", S.ABORTED, D.ABORTED),
    "destination fails in switchover": (f"{MEMORY}, > STATE, < ABORT", S.ABORTED, D.ABORTED),
    "destination can't load": (f"{END}, < ABORT", S.ABORTED, D.ABORTED),
    "destination gives up waiting for COMMIT": (f"{END}, < PREPARED, < DISCARDED", S.RETURNED, D.DISCARDED),
    "destination can't run": (f"{END}, < PREPARED, > COMMIT, < DISCARDED", S.RETURNED, D.DISCARDED),
    "a further stream": ("> JOIN, < JOINED, > BLOCK, > ROUND, > BLOCK, > ROUND", S.STREAM, D.STREAM),
    "back after a lost one": (
        "> RESUME, < HELD, < HELD, < RESUMED, > BLOCK, > ROUND, < PLACED, > STATE, > END, < PREPARED, > COMMIT, "
        "< RUNNING",
        S.DONE,
        D.DONE,
    ),
    "back, and nothing is kept": ("> RESUME, < REFUSE", S.REFUSED, D.REFUSED),
    "back, and cancelled": ("> RESUME, > ABORT", S.ABORTED, D.ABORTED),
    "a stream refused": ("> JOIN, < REFUSE", S.REFUSED, D.REFUSED),
    "asked: it runs": ("> QUERY, < RUNNING", S.DONE, D.DONE),
    "asked: discarded": ("> QUERY, < DISCARDED", S.RETURNED, D.DISCARDED),
    "asked: never heard of it": ("> QUERY, < REFUSE", S.REFUSED, D.REFUSED),
}


def steps(course):
    return [(step.split()[0], F[step.split()[1]]) for step in course.split(", ")]


@pytest.mark.parametrize(("course", "source_ends", "destination_ends"), COURSES.values(), ids=COURSES)
def test_both_ends_follow_the_course(course, source_ends, destination_ends):
    source, destination = SourceProtocol(), DestinationProtocol()
    for way, kind in steps(course):
        sender, receiver = (source, destination) if way == ">" else (destination, source)
        assert sender.may_send(kind)
        sender.sent(kind)
        receiver.received(kind)
    assert (source.state, destination.state) == (source_ends, destination_ends)


def test_the_whole_way_passes_these_states():
    source, destination = SourceProtocol(), DestinationProtocol()
    seen = [(source.state, destination.state)]
    for way, kind in steps(COURSES["the whole way"][0]):
        sender, receiver = (source, destination) if way == ">" else (destination, source)
        sender.sent(kind)
        receiver.received(kind)
        if seen[-1] != (source.state, destination.state):
            seen.append((source.state, destination.state))
    assert seen == [
        (S.IDLE, D.IDLE),
        (S.HELLO_SENT, D.HELLO_RECEIVED),
        (S.MEMORY, D.MEMORY),
        (S.SWITCHOVER, D.SWITCHOVER),
        (S.WAIT_PREPARED, D.END_RECEIVED),
        (S.PREPARED, D.PREPARED),
        (S.COMMITTED, D.COMMITTED),
        (S.DONE, D.DONE),
    ]


@pytest.mark.parametrize(
    ("course", "crossing", "source_ends", "destination_ends"),
    [
        (MEMORY, ("> ABORT", "< PLACED"), S.ABORTED, D.ABORTED),
        (MEMORY, ("> BLOCK", "< ABORT"), S.ABORTED, D.ABORTED),
        (MEMORY, ("> STATE", "< ABORT"), S.ABORTED, D.ABORTED),
        (MEMORY, ("> ABORT", "< ABORT"), S.ABORTED, D.ABORTED),
        (f"{MEMORY}, > STATE", ("> END", "< ABORT"), S.ABORTED, D.ABORTED),
        (f"{MEMORY}, > STATE", ("> DIGESTS", "< ABORT"), S.ABORTED, D.ABORTED),
        ("> HELLO", ("> ABORT", "< WELCOME"), S.ABORTED, D.ABORTED),
        ("> HELLO", ("> ABORT", "< REFUSE"), S.ABORTED, D.REFUSED),
        ("> RESUME", ("> ABORT", "< HELD"), S.ABORTED, D.ABORTED),
        ("> RESUME", ("> ABORT", "< RESUMED"), S.ABORTED, D.ABORTED),
        ("> RESUME", ("> ABORT", "< REFUSE"), S.ABORTED, D.REFUSED),
        (END, ("> ABORT", "< PREPARED"), S.ABORTED, D.ABORTED),
        (f"{END}, < PREPARED", ("> COMMIT", "< DISCARDED"), S.RETURNED, D.DISCARDED),
        (f"{END}, < PREPARED", ("> ABORT", "< DISCARDED"), S.ABORTED, D.DISCARDED),
    ],
)
def test_frames_that_cross_harm_nobody(course, crossing, source_ends, destination_ends):
    source, destination = SourceProtocol(), DestinationProtocol()
    for way, kind in steps(course):
        sender, receiver = (source, destination) if way == ">" else (destination, source)
        sender.sent(kind)
        receiver.received(kind)
    ours, theirs = (step.split()[1] for step in crossing)
    source.sent(F[ours])
    destination.sent(F[theirs])
    source.received(F[theirs])
    destination.received(F[ours])
    assert (source.state, destination.state) == (source_ends, destination_ends)


@pytest.mark.parametrize(
    ("protocol", "table"),
    [
        (SourceProtocol, states.SOURCE),
        (DestinationProtocol, states.DESTINATION),
        (SnapshotWriterProtocol, states.SNAPSHOT_WRITER),
        (SnapshotReaderProtocol, states.SNAPSHOT_READER),
    ],
)
def test_every_state_and_frame_is_in_the_table_or_an_error(protocol, table):
    all_states = type(protocol().state)
    assert set(table) == set(all_states)
    for state in all_states:
        for kind in F:
            for way, move, error in (
                (Way.SEND, protocol.sent, LocalProtocolError),
                (Way.RECEIVE, protocol.received, PeerError),
            ):
                end = protocol()
                end._state = state
                after = table[state].get(Event(way, kind))
                if after is None:
                    with pytest.raises(error, match=kind.name):
                        move(end, kind)
                    assert end.state is state
                else:
                    assert move(end, kind) is after
                    assert end.state is after


def test_whatever_crosses_no_end_breaks_the_protocol_and_never_do_both_run_the_guest():
    """Every course that two ends can take with up to two frames under way in each direction, links lost anywhere."""
    alike = {F.PONG, F.ROUND}  # everywhere where PING and BLOCK are
    start = (S.IDLE, D.IDLE, (), (), False)
    seen = {start}
    todo = deque(seen)

    def reach(*node):
        if node not in seen:
            seen.add(node)
            todo.append(node)

    while todo:
        here, there, going, coming, lost = todo.popleft()
        runs_here = here in (S.RETURNED, S.ABORTED, S.REFUSED)
        assert not (runs_here and there in (D.COMMITTED, D.DONE) and F.COMMIT not in going), (here, there)
        for (way, kind), after in states.SOURCE[here].items():
            if way is Way.SEND and kind not in alike and len(going) < 2 and not lost:
                reach(after, there, (*going, kind), coming, lost)
        for (way, kind), after in states.DESTINATION[there].items():
            if way is Way.SEND and kind not in alike and len(coming) < 2 and not lost and there is not D.IDLE:
                reach(here, after, going, (*coming, kind), lost)
        if going:
            after = states.DESTINATION[there].get(Event(Way.RECEIVE, going[0]))
            assert after is not None, f"{going[0].name} comes to a destination in state {there}, the source is {here}"
            reach(here, after, going[1:], coming, lost)
        if coming:
            after = states.SOURCE[here].get(Event(Way.RECEIVE, coming[0]))
            assert after is not None, f"{coming[0].name} comes to a source in state {here}, the destination is {there}"
            reach(after, there, going, coming[1:], lost)
        if lost:
            reach(states.SOURCE_LOST[here], there, going, (), True)
            reach(here, states.DESTINATION_LOST[there], (), coming, True)
        else:
            reach(here, there, going, coming, True)
    ends = {(here, there) for here, there, going, coming, lost in seen}
    assert {(S.DONE, D.DONE), (S.RETURNED, D.DISCARDED), (S.IN_DOUBT, D.COMMITTED), (S.IN_DOUBT, D.UNDECIDED)} <= ends


def test_a_lost_connection_before_commit_leaves_the_guest_with_the_source():
    for state in (S.HELLO_SENT, S.RESUMING, S.MEMORY, S.SWITCHOVER, S.WAIT_PREPARED, S.PREPARED):
        assert states.SOURCE_LOST[state] is S.ABORTED
    assert states.SOURCE_LOST[S.COMMITTED] is S.IN_DOUBT
    assert states.DESTINATION_LOST[D.END_RECEIVED] is D.ABORTED
    assert states.DESTINATION_LOST[D.PREPARED] is D.UNDECIDED
    assert states.DESTINATION_LOST[D.COMMITTED] is D.COMMITTED


@pytest.mark.parametrize("protocol", [SourceProtocol, DestinationProtocol, SnapshotWriterProtocol])
def test_losing_a_connection_is_defined_everywhere_and_changes_nothing_the_second_time(protocol):
    for state in type(protocol().state):
        end = protocol()
        end._state = state
        after = end.lost()
        assert end.lost() is after


def test_the_error_says_what_was_expected():
    end = DestinationProtocol()
    with pytest.raises(
        PeerError, match="the peer sent COMMIT while the destination is in state idle and expects HELLO, J"
    ):
        end.received(F.COMMIT)
    done = SourceProtocol()
    done._state = S.REFUSED
    with pytest.raises(PeerError, match="expects nothing"):
        done.received(F.PING)


def test_a_snapshot_is_written_and_read_in_the_same_order():
    writer, reader = SnapshotWriterProtocol(), SnapshotReaderProtocol()
    for kind in (F.HELLO, F.BLOCK, F.ROUND, F.BLOCK, F.ROUND, F.STATE, F.BLOCK, F.ROUND, F.END):
        writer.sent(kind)
        reader.received(kind)
    assert writer.state is reader.state is N.DONE
