"""The guest protocol's messages: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig.control import messages as m
from amig.control import replies as rp
from amig.control import requests as rq
from amig.control import types
from amig.errors import ControlError, UsageError
from amig.guest import Outcome, RunState
from amig.memory import MemoryMap, Region, Slot

ID = "0123456789abcdef" * 2

REQUESTS = [
    rq.Hello(id=1, version=1, require=("take-socket",), want_memory=True, client="amig"),
    rq.LogStart(id=2, strategy=None),
    rq.LogStart(id=2, strategy="slot-cache"),
    rq.Sync(id=3),
    rq.GiveBack(id=4, region=0, first=64, words=bytes(8)),
    rq.LogStop(id=5),
    rq.Pause(id=6),
    rq.Resume(id=7),
    rq.Save(id=8),
    rq.Prepare(id=9, migration=ID, destination="tcp://far:7000", peer="far/web1"),
    rq.Commit(id=10, migration=ID),
    rq.Release(id=11, migration=ID, outcome=Outcome.DISCARDED),
    rq.MigrationBegin(id=12, migration=ID, destination="tcp://far:7000"),
    rq.MigrationProgress(id=13, progress=types.Progress(round=3, fraction=0.5)),
    rq.MigrationEnd(id=14, status="failed", error="why"),
    rq.Leave(id=15),
    rq.Status(id=16),
    rq.Cancel(id=17),
    rq.OperatorPause(id=18),
    rq.OperatorResume(id=19),
    rq.Stop(id=20, force=True),
    rq.GuestAsk(id=24, what="verify"),
    rq.ConsoleAttach(id=21, replay=False),
    rq.ConsoleInput(id=22, data=b"ls\r"),
    rq.ConsoleDetach(id=23),
    rq.VhostAttach(id=25),
    rq.VhostStopped(id=26, number=3),
    rq.VhostDetach(id=27),
    rq.LogCounters(id=28),
]
FROM_HOST = [
    rp.Ok(id=1),
    rp.Error(id=2, code="busy", message="no"),
    rp.HelloOk(id=3, version=1, features=(), name="a", pid=1, engine="kvm", vcpus=1, state=RunState.PAUSED),
    rp.LogIsOn(id=4, strategy="exact", initially_set=True, generation=3, bitmaps=()),
    rp.Saved(id=5, state=b"state"),
    rp.StatusIs(id=6, name="a", pid=1, engine="kvm", state=RunState.FAILED, guest=types.GuestProgress(writes=1)),
    rp.GuestAsked(id=7, number=3),
    rp.CancelRequested(migration=ID),
    rp.ConsoleOutput(data=b"login:", dropped=3),
    rp.GuestEnded(state=RunState.STOPPED, reason="moved"),
    rp.VhostIsAttached(id=8, memory=types.WireMap(generation=1, regions=(), slots=()), log_bytes=4096, running=True),
    rp.VhostStop(number=3),
    rp.VhostRun(),
    rp.LogCountersAre(
        id=9,
        strategy="exact",
        syncs=1,
        gets=2,
        get_ns=3,
        takes=4,
        pages_taken=5,
        clears=6,
        clear_ns=7,
        pages_cleared=8,
        pages_marked=9,
        pages_logged=10,
        ring_full=11,
    ),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_every_request_survives_the_way(request_: m.AnyRequest) -> None:
    assert m.decode_request(m.encode(request_)) == request_


@pytest.mark.parametrize("message", FROM_HOST, ids=lambda r: type(r).__name__)
def test_every_message_of_the_host_survives_the_way(message: m.AnyFromHost) -> None:
    assert m.decode_from_host(m.encode(message)) == message


def test_no_message_was_forgotten_here() -> None:
    assert {type(r) for r in REQUESTS} == set(m.AnyRequest.__args__)
    assert {type(r) for r in FROM_HOST} == set(m.AnyFromHost.__args__)


def test_types_are_written_with_hyphens() -> None:
    assert msgspec.msgpack.decode(m.encode(rq.LogStart(id=1)))["type"] == "log-start"


@pytest.mark.parametrize(
    "message",
    [
        {"type": "no-such", "id": 1},
        {"id": 1},
        {"type": "sync", "id": 1, "surplus": 1},
        {"type": "sync", "id": -1},
        {"type": "sync", "id": 2**32},
        {"type": "sync", "id": "1"},
        {"type": "ok", "id": 1},
        {"type": "give-back", "id": 1, "region": 0, "first": 0},
        {"type": "give-back", "id": 1, "region": 0, "first": 0, "words": b"\0" * (8 * types.MAX_GIVE_BACK_WORDS + 8)},
        {"type": "give-back", "id": 1, "region": 0, "first": 2**63, "words": b""},
        {"type": "commit", "id": 1, "migration": "x"},
        {"type": "commit", "id": 1, "migration": ID + "\n"},
        {"type": "release", "id": 1, "migration": ID, "outcome": "maybe"},
        {"type": "hello", "id": 1, "version": 1, "require": ["x"] * 65},
        {"type": "hello", "id": 1, "version": 1, "client": "x" * 257},
        {"type": "stop", "id": 1, "force": "yes"},
        {"type": "console-input", "id": 1, "data": b"x" * (types.MAX_CONSOLE_BYTES + 1)},
        ["sync", 1],
        None,
        7,
    ],
    ids=lambda message: repr(message)[:40],
)
def test_what_is_no_request_is_refused(message: object) -> None:
    with pytest.raises(ControlError) as caught:
        m.decode_request(msgspec.msgpack.encode(message))
    assert caught.value.code == "malformed"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for decode in (m.decode_request, m.decode_from_host):
        with contextlib.suppress(ControlError):  # anything else would end the host's connection with a traceback
            decode(data)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ControlError):
        m.decode_request(b"\x91" * 60_000)


def test_a_memory_map_is_checked_when_it_comes_from_outside() -> None:
    good = MemoryMap(
        generation=4,
        regions=(Region(id=0, size=8192),),
        slots=(Slot(index=0, guest_phys=0, size=8192, region=0, offset=0),),
    )
    assert types.WireMap.of(good).memory_map() == good
    bad = msgspec.structs.replace(types.WireMap.of(good), regions=(types.WireRegion(id=0, size=4096),))
    with pytest.raises(UsageError, match="leaves its region"):
        bad.memory_map()


def test_the_largest_memory_map_fits_its_frame() -> None:
    largest = MemoryMap(
        generation=2**62,
        regions=tuple(Region(id=2**32 - 1 - i, size=16 << 40) for i in range(64)),
        slots=tuple(
            Slot(index=2**31 + i, guest_phys=i << 40, size=1 << 40, region=2**32 - 1, offset=0) for i in range(512)
        ),
    )
    hello = rp.HelloOk(
        id=1, version=1, features=(), name="a", pid=1, engine="kvm", vcpus=1, state=RunState.RUNNING,
        memory=types.WireMap.of(largest), machine=bytes(256 << 10),
    )  # fmt: skip
    assert len(m.encode(hello)) < types.MAX_HELLO_FRAME


def test_the_largest_of_the_other_requests_fit_the_common_frame() -> None:
    words = bytes(8 * types.MAX_GIVE_BACK_WORDS)
    largest = rq.GiveBack(id=2**32 - 1, region=2**32 - 1, first=2**63 - 1, words=words)
    assert len(m.encode(largest)) <= types.MAX_FRAME
