"""Control messages: both ways, bounded, and nothing but `PeerError` for what is malformed."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig.errors import PeerError
from amig.memory import MemoryMap, Region, Slot
from amig.wire import limits, messages
from amig.wire.frames import PAYLOAD_SIZES
from amig.wire.frametype import FrameType
from amig.wire.messages import Hello

ID = "0123456789abcdef" * 2
GIB = 1 << 30
MAP = MemoryMap(
    generation=3,
    regions=(Region(id=0, size=4 * GIB),),
    slots=(
        Slot(index=0, guest_phys=0, size=3 * GIB, region=0, offset=0),
        Slot(index=1, guest_phys=4 * GIB, size=GIB, region=0, offset=3 * GIB),
    ),
)
HELLO = Hello(migration=ID, name="web1", engine="kvm", vcpus=4, memory=MAP, machine=b"cpuid", streams=2)
ALL = [
    HELLO,
    messages.Welcome(migration=ID, name="web1", identity="web1 on hostb", token=bytes(32), features=("digest",)),
    messages.Refuse(code="name-taken", reason="a guest of that name lives here"),
    messages.Join(migration=ID, token=bytes(32), stream=1),
    messages.Joined(stream=1),
    messages.Round(round=3, pages=12345),
    messages.Placed(round=3),
    messages.End(rounds=4, pages=100, zero_pages=7, state_bytes=9000, state_digest=bytes(32)),
    messages.Prepared(migration=ID, load_ns=12),
    messages.Commit(migration=ID),
    messages.Running(migration=ID, start_ns=99),
    messages.Discarded(migration=ID, reason="the source asked for it"),
    messages.Abort(code="cancelled", reason="the operator cancelled"),
    messages.Ping(seq=1, sent_ns=2),
    messages.Pong(seq=1, sent_ns=2),
    messages.Query(migration=ID),
    messages.Resume(migration=ID, token=bytes(32), since=0, round=7),
    messages.Held(region=0, first=64, pages=bytes(8)),
    messages.Resumed(migration=ID, rounds=5, token=bytes(32)),
    messages.Digests(region=0, first=4096, digests=bytes(8 * 4096)),
]


def raw(message, **changes):
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    return msgspec.msgpack.encode({**fields, **changes})


@pytest.mark.parametrize("message", ALL, ids=lambda m: type(m).__name__)
def test_every_message_survives_the_way_to_the_peer(message):
    kind = messages.frame_type(message)
    assert messages.decode(kind, messages.encode(message)) == message


def test_every_control_frame_type_has_a_message():
    assert {messages.frame_type(m) for m in ALL} == set(FrameType) - {FrameType.BLOCK, FrameType.STATE}


@pytest.mark.parametrize("message", ALL, ids=lambda m: type(m).__name__)
def test_trailing_cut_and_unknown_content_is_refused(message):
    kind, payload = messages.frame_type(message), messages.encode(message)
    for bad in (payload + b"\0", payload[:-1], payload[:1], raw(message, surprise=1), b"\xc0", b"\x90"):
        with pytest.raises(PeerError, match=f"malformed {kind.name}"):
            messages.decode(kind, bad)


@pytest.mark.parametrize("message", ALL, ids=lambda m: type(m).__name__)
@given(data=st.data())
def test_a_mutated_message_is_read_or_refused_and_nothing_else(message, data):
    payload = bytearray(messages.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = messages.decode(messages.frame_type(message), payload)
    except PeerError:
        return
    assert messages.decode(messages.frame_type(message), messages.encode(read)) == read


@given(kind=st.sampled_from(sorted(set(FrameType))), payload=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(kind, payload):
    with contextlib.suppress(PeerError):
        messages.decode(kind, payload)


def test_deep_nesting_is_refused():
    for opener in (b"\x91", b"\x81\xa7version", b"\x81\xa1x"):
        with pytest.raises(PeerError):
            messages.decode(FrameType.HELLO, opener * 50_000)


@pytest.mark.parametrize(
    "changes",
    [
        {"migration": "0" * 31},
        {"migration": "0" * 32 + "\n"},
        {"migration": "G" * 32},
        {"name": ""},
        {"name": "two words"},
        {"name": "bell\a"},
        {"name": "x" * 129},
        {"vcpus": 0},
        {"vcpus": 4097},
        {"vcpus": 1.5},
        {"streams": 0},
        {"streams": 65},
        {"machine": bytes(limits.MAX_MACHINE + 1)},
        {"features_required": ["f"] * 65},
        {"features_optional": ["x" * 129]},
        {"compression": "lzma"},
        {"clock": "sundial"},
        {"version": -1},
        {"memory": {"generation": 0, "regions": [], "slots": []}},
        {"memory": {"generation": -1, "regions": [{"id": 0, "size": 4096}], "slots": []}},
        {
            "memory": {
                "generation": 0,
                "regions": [{"id": 0, "size": 4096}],
                "slots": [{"index": 0, "guest_phys": 0, "size": 8192, "region": 0, "offset": 0}],
            }
        },
    ],
    ids=lambda c: ",".join(c),
)
def test_a_hello_outside_the_limits_is_refused(changes):
    with pytest.raises(PeerError):
        messages.decode(FrameType.HELLO, raw(HELLO, **changes))


def test_the_largest_memory_map_and_machine_fit_a_hello():
    regions = tuple(Region(id=2**32 - 1 - i, size=1 << 40) for i in range(64))
    slots = tuple(
        Slot(index=2**31 + i, guest_phys=(1 << 51) + (i << 33), size=1 << 33, region=regions[i % 64].id, offset=1 << 39)
        for i in range(512)
    )
    hello = Hello(
        migration=ID,
        name="n" * 128,
        engine="kvm",
        vcpus=4096,
        memory=MemoryMap(generation=2**40, regions=regions, slots=slots),
        machine=bytes(limits.MAX_MACHINE),
        features_required=("f" * 128,) * 64,
        features_optional=("f" * 128,) * 64,
    )
    assert len(messages.encode(hello)) < PAYLOAD_SIZES[FrameType.HELLO][1]


def test_another_version_is_named_even_if_the_rest_of_its_hello_is_not_understood():
    with pytest.raises(messages.Mismatch, match=r"version 2 .*version 1") as caught:
        messages.decode(FrameType.HELLO, msgspec.msgpack.encode({"version": 2, "whatever": [1, 2]}))
    assert caught.value.theirs == 2


def test_unknown_required_features_are_refused_by_name_and_unknown_optional_ones_left_out():
    hello = msgspec.structs.replace(HELLO, features_required=("a", "b"), features_optional=("c", "d", "a"))
    assert messages.agree(hello, ["a", "b", "d"]) == ("a", "b", "d")
    with pytest.raises(PeerError, match="requires b, which"):
        messages.agree(hello, ["a", "d"])


def test_reasons_are_cleaned_of_what_would_disturb_a_terminal():
    said = messages.Abort(code="x", reason="red \x1b[31m\nnext line \u202e and " + "long" * 1000)
    assert "\x1b" not in said.reason
    assert "\n" not in said.reason
    assert "\u202e" not in said.reason
    assert len(said.reason) == limits.MAX_TEXT
    heard = messages.decode(FrameType.ABORT, msgspec.msgpack.encode({"code": "x", "reason": "a\x1b[2Jb\rc"}))
    assert heard.reason == "a [2Jb c"
    assert messages.Welcome(migration=ID, name="w", identity="a\x07b", token=bytes(16)).identity == "a b"
    lone = messages.Abort(code="x", reason="file \udcff")
    assert messages.decode(FrameType.ABORT, messages.encode(lone)).reason == lone.reason


def test_a_message_that_no_peer_would_take_is_our_own_error():
    with pytest.raises(ValueError, match="no peer would take"):
        messages.encode(messages.Commit(migration="nonsense"))
    with pytest.raises(ValueError, match="at most"):
        messages.encode(msgspec.structs.replace(HELLO, machine=bytes(limits.MAX_HELLO)))
