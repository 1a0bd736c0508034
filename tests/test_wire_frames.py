"""The frame header: what it holds, what it refuses, and that no length gets past it."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig.errors import PeerError
from amig.wire import frames, limits
from amig.wire.frames import PAYLOAD_SIZES, UNSUMMED_DATA
from amig.wire.frametype import FrameType


def test_the_layout_is_the_documented_one():
    raw = frames.encode_header(FrameType.PING, 0x0102, 0x1122334455667788)
    assert raw == bytes.fromhex("02010000 10 00 0000 8877665544332211")


def test_numbers_of_frame_types_never_change():
    assert {t.name: int(t) for t in FrameType} == {
        "HELLO": 1,
        "WELCOME": 2,
        "REFUSE": 3,
        "JOIN": 4,
        "JOINED": 5,
        "BLOCK": 6,
        "ROUND": 7,
        "PLACED": 8,
        "STATE": 9,
        "END": 10,
        "PREPARED": 11,
        "COMMIT": 12,
        "RUNNING": 13,
        "DISCARDED": 14,
        "ABORT": 15,
        "PING": 16,
        "PONG": 17,
        "QUERY": 18,
        "DIGESTS": 22,
        "RESUME": 23,
        "RESUMED": 24,
        "HELD": 25,
    }


@pytest.mark.parametrize("kind", FrameType)
def test_every_type_has_limits_and_keeps_them_both_ways(kind):
    low, high = PAYLOAD_SIZES[kind]
    for length in (low, high):
        assert frames.decode_header(frames.encode_header(kind, length, 7)).length == length
    for length in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"a {kind.name} frame"):
            frames.encode_header(kind, length, 0)
        with pytest.raises(PeerError, match=f"sent a {kind.name} frame of {length} bytes"):
            frames.decode_header(struct.pack("<IBBHQ", length, kind, 0, 0, 0))


def test_the_largest_frame_of_all_is_little_more_than_a_block():
    assert max(high for _, high in PAYLOAD_SIZES.values()) == 40 + 2 * (64 << 10) + 4 * limits.MIB


@pytest.mark.parametrize("number", [0, 99, 255])
def test_an_unknown_type_is_refused(number):
    with pytest.raises(PeerError, match=f"unknown type {number}"):
        frames.decode_header(struct.pack("<IBBHQ", 10, number, 0, 0, 0))


def test_somebody_elses_protocol_is_refused():
    with pytest.raises(PeerError, match="not amig"):
        frames.decode_header(b"GET / HTTP/1.1\r\n")


def test_flags_and_reserved_bits_that_mean_nothing_are_refused():
    for flags, reserved in ((2, 0), (0x80, 0), (0, 1)):
        with pytest.raises(PeerError, match="unknown flags"):
            frames.decode_header(struct.pack("<IBBHQ", 100, FrameType.BLOCK, flags, reserved, 0))
    with pytest.raises(PeerError, match="unknown flags"):
        frames.decode_header(struct.pack("<IBBHQ", 100, FrameType.PING, UNSUMMED_DATA, 0, 0))
    assert not frames.decode_header(struct.pack("<IBBHQ", 100, FrameType.BLOCK, UNSUMMED_DATA, 0, 0)).data_is_summed


@given(st.lists(st.binary(max_size=50)))
def test_a_checksum_over_parts_is_that_of_the_whole(parts):
    whole = b"".join(parts)
    assert frames.checksum(FrameType.BLOCK, 9, *parts) == frames.checksum(FrameType.BLOCK, 9, whole)


def test_a_damaged_payload_or_header_fails_the_checksum():
    raw, payload = frames.frame(FrameType.PING, b"some payload")
    header = frames.decode_header(raw)
    frames.verify(header, frames.checksum(header.type, header.length, payload))
    for kind, length, content in (
        (FrameType.PING, 12, b"some pAyload"),
        (FrameType.PONG, 12, payload),
        (FrameType.PING, 13, payload),
    ):
        with pytest.raises(PeerError, match="arrived damaged"):
            frames.verify(header, frames.checksum(kind, length, content))


@given(st.binary(min_size=16, max_size=16))
def test_any_16_bytes_are_a_header_within_limits_or_refused(raw):
    try:
        header = frames.decode_header(raw)
    except PeerError:
        return
    low, high = PAYLOAD_SIZES[header.type]
    assert low <= header.length <= high
    assert frames.encode_header(header.type, header.length, header.checksum, header.flags) == raw
