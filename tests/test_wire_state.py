"""STATE: cut in parts, put together again, and never more held than came."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig.errors import PeerError
from amig.wire import limits, state


def part(total, offset, content):
    return struct.pack("<QQ", total, offset) + content


@pytest.mark.parametrize("size", [1, limits.MAX_STATE_PART, limits.MAX_STATE_PART + 1, 3 * limits.MAX_STATE_PART])
def test_a_state_arrives_whole(size):
    content = bytes(range(256)) * (size // 256 + 1)
    content = content[:size]
    assembler = state.StateAssembler()
    frames = [head + bytes(view) for head, view in state.split(content)]
    assert len(frames) == -(-size // limits.MAX_STATE_PART)
    for frame in frames[:-1]:
        assert not assembler.add(frame)
    assert assembler.add(frames[-1])
    assert assembler.take() == content


def test_the_digest_is_the_documented_one():
    assert state.digest(b"abc").hex() == "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319"


@pytest.mark.parametrize("size", [0, limits.MAX_STATE + 1])
def test_a_state_outside_the_limits_is_not_sent(size):
    with pytest.raises(ValueError, match="a state of"):
        list(state.split(bytes(size)))


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([b""], "STATE frame of 0 bytes"),
        ([part(1, 0, b"")], "STATE frame of 16 bytes"),
        ([part(0, 0, b"x")], "a state of 0 bytes"),
        ([part(limits.MAX_STATE + 1, 0, b"x")], "announced a state of"),
        ([part(4, 1, b"x")], "out of order"),
        ([part(4, 0, b"12345")], "out of order"),
        ([part(4, 0, b"12"), part(4, 0, b"12")], "out of order"),
        ([part(4, 0, b"12"), part(4, 3, b"1")], "out of order"),
        ([part(4, 0, b"12"), part(5, 2, b"12")], "a state of 5 bytes"),
        ([part(4, 0, b"1234"), part(4, 4, b"5")], "out of order"),
        ([part(2 * limits.MAX_STATE_PART, 0, bytes(limits.MAX_STATE_PART + 1))], "out of order"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, text):
    assembler = state.StateAssembler()
    for good in parts[:-1]:
        assembler.add(good)
    with pytest.raises(PeerError, match=text):
        assembler.add(parts[-1])


def test_a_state_is_not_had_before_its_last_part():
    assembler = state.StateAssembler()
    with pytest.raises(PeerError, match="0 of 0 bytes"):
        assembler.take()
    assembler.add(part(4, 0, b"12"))
    with pytest.raises(PeerError, match="2 of 4 bytes"):
        assembler.take()


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_any_payloads_are_taken_or_refused(payloads):
    assembler = state.StateAssembler()
    try:
        for payload in payloads:
            assembler.add(payload)
    except PeerError:
        return
    assert assembler.complete in (True, False)
