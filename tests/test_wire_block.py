"""BLOCK: what is described arrives, and nothing a peer may send gets past the checks."""

import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig.errors import PeerError
from amig.memory import MemoryMap, Region, Slot
from amig.wire import block, frames, limits
from amig.wire.block import Codec
from amig.wire.frametype import FrameType

PAGES = limits.MAX_BLOCK_SPAN + 128
MANY = limits.MAX_BLOCK_PAGES + 1
MAP = MemoryMap(
    generation=0,
    regions=(Region(id=0, size=64 * 4096), Region(id=7, size=PAGES * 4096)),
    slots=(Slot(index=0, guest_phys=0, size=4096, region=7, offset=0),),
)


def bitmap(span, pages):
    number = sum(1 << int(p) for p in set(pages))
    return np.frombuffer(number.to_bytes(-(-span // 64) * 8, "little"), dtype=np.uint64)


def describe(span=70, pages=(0, 1, 69), zero=(1,), **changes):
    fields = {"round": 2, "region": 7, "first_page": 64, "span_pages": span}
    fields |= {"pages": bitmap(span, pages), "zero": bitmap(span, zero)}
    return block.describe(**(fields | changes))


def wire(described):
    return block.encode_header(described.header) + described.pages.tobytes() + described.zero.tobytes()


def read(raw, data_bytes, memory=MAP, length=None):
    """Header, then bitmaps, as a receiver reads them."""
    size = len(raw) + data_bytes if length is None else length
    frame = frames.decode_header(frames.encode_header(FrameType.BLOCK, size, 0))
    header = block.decode_header(raw[:40], frame, memory)
    return block.decode_bitmaps(header, raw[40 : 40 + 2 * header.bitmap_bytes])


def patched(described, **changes):
    return block.encode_header(dataclasses.replace(described.header, **changes)) + wire(described)[40:]


def test_the_layout_is_the_documented_one():
    raw = wire(describe())
    assert struct.unpack("<IIQIBBHIIII", raw[:40]) == (2, 7, 64, 70, 0, 0, 0, 2, 1, 8192, 8192)
    assert raw[40:] == struct.pack("<4Q", 3, 1 << 5, 2, 0)


def test_a_block_arrives_as_it_was_described():
    sent = describe()
    got = read(wire(sent), 8192)
    assert got.header == sent.header
    assert got.pages.tolist() == sent.pages.tolist()
    assert got.zero.tolist() == sent.zero.tolist()
    assert got.with_data.tolist() == [1, 1 << 5]
    assert got.header.payload_bytes == 40 + 32 + 8192


@given(data=st.data(), span=st.integers(1, 400))
def test_any_block_survives_the_way(data, span):
    pages = data.draw(st.sets(st.integers(0, span - 1), min_size=1, max_size=256))
    zero = data.draw(st.sets(st.sampled_from(sorted(pages))))
    sent = describe(span, pages, zero)
    assert (sent.header.data_pages, sent.header.zero_pages) == (len(pages - zero), len(zero))
    assert read(wire(sent), sent.header.data_bytes).header == sent.header


@given(data=st.data())
def test_a_mutated_block_is_read_or_refused_and_nothing_else(data):
    sent = describe()
    raw = bytearray(wire(sent))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = read(bytes(raw), sent.header.data_bytes)
    except PeerError:
        return
    head = got.header
    assert head.first_page + head.span_pages <= MAP.region(head.region).pages
    assert head.data_bytes <= head.raw_bytes == head.data_pages * 4096 <= limits.MAX_BLOCK_DATA


def test_compressed_data_may_have_any_length_below_the_pages():
    sent = describe(codec=Codec.ZSTD, data_bytes=100)
    assert read(wire(sent), 100).header.data_bytes == 100


def test_the_widest_and_the_fullest_block_pass():
    span = limits.MAX_BLOCK_SPAN
    wide = describe(span, [0, span - 1], [])
    assert read(wire(wide), 8192).header.span_pages == span
    full = describe(limits.MAX_BLOCK_PAGES, range(limits.MAX_BLOCK_PAGES), [])
    assert full.header.data_bytes == limits.MAX_BLOCK_DATA
    zeros = describe(span, range(span), range(span))
    assert read(wire(zeros), 0).header.zero_pages == span


def test_a_block_may_end_with_its_region():
    assert read(wire(describe(64, [0], [], region=0, first_page=0)), 4096).header.region == 0


WRONG = {
    "round": ({"round": limits.MAX_ROUND + 1}, "round"),
    "no such region": ({"region": 1}, "no memory region 1"),
    "unaligned": ({"first_page": 65}, "not a multiple of 64"),
    "past the region": ({"first_page": PAGES - 64}, "leave region 7"),
    "far past the region": ({"first_page": 2**64 - 64}, "leave region 7"),
    "no span": ({"span_pages": 0}, "a span of 0 pages"),
    "too wide": ({"span_pages": limits.MAX_BLOCK_SPAN + 1}, f"a span of {limits.MAX_BLOCK_SPAN + 1} pages"),
    "too many pages": ({"data_pages": MANY, "raw_bytes": MANY * 4096, "data_bytes": 4096}, f"{MANY} pages with data"),
    "no pages": ({"data_pages": 0, "zero_pages": 0, "raw_bytes": 0, "data_bytes": 0}, "0 pages with data and 0 zero"),
    "raw size": ({"raw_bytes": 8191}, "8191 once decoded"),
    "bomb": ({"raw_bytes": 2**32 - 1, "codec": Codec.ZSTD}, "once decoded"),
    "more data than pages": ({"data_bytes": 8193, "codec": Codec.ZSTD}, "8193 bytes"),
    "no data": ({"data_bytes": 0, "codec": Codec.ZSTD}, "0 bytes of ZSTD data"),
    "data for no pages": ({"data_pages": 0, "raw_bytes": 0}, "8192 bytes"),
    "short raw data": ({"data_bytes": 4096}, "4096 bytes of RAW data"),
    "not the frame's length": ({"data_bytes": 4096, "codec": Codec.ZSTD}, "the frame has"),
    "fewer zero pages": ({"zero_pages": 0}, "its header says otherwise"),
    "bits past the span": ({"span_pages": 69}, "bits past its span"),
}


@pytest.mark.parametrize(("changes", "text"), WRONG.values(), ids=WRONG)
def test_a_header_that_lies_is_refused(changes, text):
    with pytest.raises(PeerError, match=text):
        read(patched(describe(), **changes), 8192)


@pytest.mark.parametrize("at", [20, 21, 22, 23])
def test_unknown_codecs_and_reserved_bytes_are_refused(at):
    raw = bytearray(wire(describe()))
    raw[at] = 99
    with pytest.raises(PeerError, match="unknown codec"):
        read(bytes(raw), 8192)


def test_bitmaps_that_disagree_are_refused():
    raw = wire(describe())
    for bitmaps, text in (
        ((3, 1 << 5, 4, 0), "does not speak of"),
        ((3, 1 << 6, 2, 0), "bits past its span"),
        ((7, 1 << 5, 2, 0), "3 pages with data"),
        ((3, 1 << 5, 0, 0), "3 pages with data and 0 zero pages"),
    ):
        with pytest.raises(PeerError, match=text):
            read(raw[:40] + struct.pack("<4Q", *bitmaps), 8192)


def test_bitmaps_of_another_length_are_refused():
    header = describe().header
    with pytest.raises(PeerError, match="bitmaps of 3 words"):
        block.decode_bitmaps(header, bytes(24))


@pytest.mark.parametrize(
    "changes",
    [
        {"zero": [2]},
        {"pages": [], "zero": []},
        {"pages": [70]},
        {"first_page": 1},
        {"first_page": -64},
        {"region": -1},
        {"span_pages": 200},
        {"data_bytes": 8193, "codec": Codec.ZSTD},
        {"span": MANY, "pages": range(MANY), "zero": []},
    ],
    ids=str,
)
def test_a_block_that_no_receiver_would_take_is_not_described(changes):
    with pytest.raises(ValueError, match="no receiver would take"):
        describe(**changes)
