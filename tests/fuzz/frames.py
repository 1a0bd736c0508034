"""Frames and blocks: whatever comes, it is decoded or refused, and nothing is asked for beyond the limits."""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any

import numpy as np

from amig.errors import AmigError, LinkLost
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot
from amig.transport.framed import FramedConnection
from amig.wire import block, limits, messages
from amig.wire.frametype import FrameType
from amig.wire.state import StateAssembler

from . import streams
from .target import Target

ID = "0123456789abcdef" * 2
REGION = 1 << 20
MAP = MemoryMap(
    generation=3,
    regions=(Region(id=0, size=REGION), Region(id=7, size=200 * PAGE_SIZE)),
    slots=(
        Slot(index=0, guest_phys=0, size=REGION, region=0, offset=0),
        Slot(index=1, guest_phys=1 << 32, size=200 * PAGE_SIZE, region=7, offset=0),
    ),
)
HELLO = messages.Hello(
    migration=ID,
    name="web1",
    engine="kvm",
    vcpus=2,
    memory=MAP,
    machine=b"machine",
    features_optional=("one", "two"),
    streams=2,
    compression="zstd",
)
MOST_AT_ONCE = max(limits.MAX_HELLO, limits.MAX_BLOCK_DATA, limits.MAX_STATE_PART + 16)


class Tape:
    """A connection that has everything at once, then ends."""

    peer = "tape"
    identity = b""
    pages = None
    bytes_sent = bytes_received = 0

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    async def recv_into(self, *views: Any) -> None:
        for view in views:
            flat = memoryview(view).cast("B")
            assert len(flat) <= MOST_AT_ONCE, f"{len(flat)} bytes were asked for"
            if self.at + len(flat) > len(self.content):
                raise LinkLost("the tape ends")
            flat[:] = self.content[self.at : self.at + len(flat)]
            self.at += len(flat)

    async def send(self, *buffers: Any) -> None:
        raise AssertionError("a decoder sends nothing")

    def outstanding(self) -> None:
        return None

    async def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


def drive(work: Coroutine[Any, Any, None]) -> None:
    """Run what never waits, without an event loop."""
    try:
        work.send(None)
    except StopIteration:
        return
    work.close()
    raise AssertionError("it waits for something")


async def decode(tape: Tape) -> None:
    link = FramedConnection(tape)
    assembler = StateAssembler()
    while True:
        header = await link.read_header()
        if header.type is FrameType.BLOCK:
            await _block(link, await link.read_block(header, MAP))
        elif header.type is FrameType.STATE:
            if assembler.add(await link.read_payload(header)):
                assert 0 < len(assembler.take()) <= limits.MAX_STATE
                assembler = StateAssembler()
        else:
            found = await link.read_message(header)
            assert messages.frame_type(found) is header.type
            assert messages.decode(header.type, messages.encode(found)) == found


async def _block(link: FramedConnection, found: block.BlockFrame) -> None:
    head = found.header
    region = MAP.region(head.region)
    assert head.first_page + head.span_pages <= region.pages
    bits = np.unpackbits(found.with_data.view(np.uint8), bitorder="little").nonzero()[0]
    assert len(bits) == head.data_pages
    assert not len(bits) or bits[-1] < head.span_pages
    again = block.describe(
        round=head.round,
        region=head.region,
        first_page=head.first_page,
        span_pages=head.span_pages,
        pages=found.pages,
        zero=found.zero,
        codec=head.codec,
        data_bytes=head.data_bytes,
    )
    assert again.header == head
    if head.data_bytes:
        await link.read_data(bytearray(head.data_bytes))


def run(data: bytes) -> None:
    with contextlib.suppress(AmigError):
        drive(decode(Tape(data)))


def every_message() -> Iterator[messages.Message]:
    yield HELLO
    yield messages.Welcome(
        migration=ID, name="web1", identity="hostb/web1", token=bytes(32), features=("one",), streams=2
    )
    yield messages.Refuse(code="busy", reason="another migration is arriving here")
    yield messages.Join(migration=ID, token=bytes(32), stream=1)
    yield messages.Joined(stream=1)
    yield messages.Round(round=0, pages=3)
    yield messages.Placed(round=0)
    yield messages.End(rounds=1, pages=2, zero_pages=1, state_bytes=5, state_digest=bytes(32))
    yield messages.Prepared(migration=ID, load_ns=12345)
    yield messages.Commit(migration=ID)
    yield messages.Running(migration=ID, start_ns=12345)
    yield messages.Discarded(migration=ID, reason="lost")
    yield messages.Abort(code="failed", reason="a reason")
    yield messages.Ping(seq=1, sent_ns=2)
    yield messages.Pong(seq=1, sent_ns=2)
    yield messages.Query(migration=ID)
    yield messages.Digests(region=0, first=0, digests=bytes(range(64)))


def a_block(**changes: Any) -> block.BlockFrame:
    fields: dict[str, Any] = {"round": 0, "region": 0, "first_page": 64, "span_pages": 64}
    fields |= {"pages": np.array([0b1011], np.uint64), "zero": np.array([0b1010], np.uint64)}
    return block.describe(**(fields | changes))


def seeds() -> Iterator[tuple[str, bytes]]:
    for found in every_message():
        yield type(found).__name__.lower(), streams.message(found)
    content = bytes(range(256)) * 16
    yield "block", streams.block(a_block(), content)
    yield "block-unsummed", streams.block(a_block(), content, summed=False)
    wide = {"first_page": 0, "span_pages": 200, "region": 7}
    bits = np.zeros(4, np.uint64)
    bits[3] = 1
    yield "block-wide", streams.block(a_block(**wide, pages=bits, zero=bits))
    packed = b"not looked at here"
    yield "block-packed", streams.block(a_block(codec=block.Codec.ZSTD, data_bytes=len(packed)), packed)
    yield "state", streams.state(b"device state")
    some = [messages.Ping(seq=1, sent_ns=2), messages.Round(round=0, pages=3), messages.Commit(migration=ID)]
    yield (
        "several",
        b"".join(streams.message(m) for m in some) + streams.state(b"abc") + streams.block(a_block(), content),
    )


TARGET = Target(
    name="frames",
    run=run,
    seeds=seeds,
    most=16 << 10,
    memory=4 << 20,
    mutate=streams.mutate,
    words=tuple(field.encode() for field in messages.Hello.__struct_fields__ + messages.End.__struct_fields__),
)
