"""Frames over a connection: every kind, whole and byte by byte, honest and hostile."""

import asyncio
import contextlib
import struct

import numpy as np
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from amig import transport
from amig.errors import LinkLost, PeerError
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot
from amig.pieces import Pieces
from amig.transport import file
from amig.transport.framed import FramedConnection
from amig.wire import block, frames, limits, messages
from amig.wire.block import Codec
from amig.wire.frametype import FrameType
from amig.wire.state import StateAssembler
from amig.wire.states import DestinationProtocol, LocalProtocolError, SourceProtocol, SourceState

ID = "0123456789abcdef" * 2
SIZE = 64 << 20
MAP = MemoryMap(
    generation=0,
    regions=(Region(id=0, size=SIZE),),
    slots=(Slot(index=0, guest_phys=0, size=SIZE, region=0, offset=0),),
)
HELLO = messages.Hello(migration=ID, name="web1", engine="kvm", vcpus=1, memory=MAP, machine=b"m")
WELCOME = messages.Welcome(migration=ID, name="web1", identity="b", token=bytes(16))
PAGES = np.random.default_rng(1).integers(0, 256, (3, 4096), dtype=np.uint8)


def described(pages=0b1011, zero=0b0010, span=64, **changes):
    fields = {"round": 1, "region": 0, "first_page": 128, "span_pages": span}
    fields |= {"pages": np.array([pages], np.uint64), "zero": np.array([zero], np.uint64)}
    return block.describe(**(fields | changes))


class Tape:
    """A connection that keeps what is sent, and gives back what it was made with, then ends."""

    def __init__(self, content=b"", asked=None):
        self.content = bytearray(content)
        self.asked = asked if asked is not None else []
        self.at = 0
        self.peer = "tape"
        self.bytes_sent = self.bytes_received = 0
        self.pages = self

    async def send_pieces(self, head, pieces):
        await self.send(head, *pieces.views())

    async def recv_pieces(self, pieces):
        await self.recv_into(*pieces.views())

    async def send(self, *buffers):
        for buffer in buffers:
            await asyncio.sleep(0)  # as a connection that has to wait
            self.content += memoryview(buffer).cast("B") if memoryview(buffer).nbytes else b""

    async def recv_into(self, *views):
        for view in views:
            size = memoryview(view).nbytes
            self.asked.append(size)
            if self.at + size > len(self.content):
                raise LinkLost("the tape ends")
            memoryview(view).cast("B")[:] = self.content[self.at : self.at + size]
            self.at += size

    def outstanding(self):
        return None

    async def close(self):
        pass

    def abort(self):
        pass


def pieces(memory, *pages):
    return Pieces(memory, np.array(pages, np.int64))


async def send_all(link):
    """Send one frame of every kind."""
    sent = await link.send_message(HELLO)
    sent += await link.send_block(described(), PAGES[0].data, PAGES[1].data)
    if link.connection.pages is None:
        sent += await link.send_block(described(), PAGES[:2].data)
    else:
        sent += await link.send_live_block(described(), pieces(PAGES, 0, 1))
    sent += await link.send_block(described(0b111, 0b111))
    sent += await link.send_block(described(codec=Codec.ZSTD, data_bytes=5), b"12345")
    sent += await link.send_message(messages.Round(round=1, pages=12))
    sent += await link.send_state(b"s" * (limits.MAX_STATE_PART + 10))
    return sent + await link.send_message(messages.Ping(seq=1, sent_ns=2))


async def read_all(link, *, scatter=False, most=1000):
    """Read frames until the stream ends, or so many things have come; returns them."""
    came = []
    assembler = StateAssembler()
    while len(came) < most:
        try:
            header = await link.read_header()
        except LinkLost:
            return came
        if header.type is FrameType.BLOCK:
            got = await link.read_block(header, MAP)
            data = np.zeros(got.header.data_bytes, np.uint8)
            if got.header.codec is Codec.RAW and got.header.data_bytes and scatter:
                memory = np.zeros((5, PAGE_SIZE), np.uint8)
                await link.read_data(pieces(memory, 1, 3))
                data = memory[[1, 3]]
                assert not memory[[0, 2, 4]].any()
            elif got.header.data_bytes:
                await link.read_data(data.data)
            came.append((got.header, got.pages.tolist(), got.zero.tolist(), data.tobytes()))
        elif header.type is FrameType.STATE:
            if assembler.add(await link.read_payload(header)):
                came.append(assembler.take())
        else:
            came.append(await link.read_message(header))
    return came


EXPECTED = [
    HELLO,
    (described().header, [0b1011], [0b10], PAGES[:2].tobytes()),
    (described().header, [0b1011], [0b10], PAGES[:2].tobytes()),
    (described(0b111, 0b111).header, [0b111], [0b111], b""),
    (described(codec=Codec.ZSTD, data_bytes=5).header, [0b1011], [0b10], b"12345"),
    messages.Round(round=1, pages=12),
    b"s" * (limits.MAX_STATE_PART + 10),
    messages.Ping(seq=1, sent_ns=2),
]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner.run


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_every_kind_of_frame_arrives(run, kind, scatter, tmp_path):
    async def main():
        listener = await transport.listen("tcp://127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/s")
        near, far = await asyncio.gather(transport.connect(listener.address), listener.accept())
        source, destination = FramedConnection(near), FramedConnection(far)
        reading = asyncio.create_task(read_all(destination, scatter=scatter))
        sent = await send_all(source)
        closing = asyncio.create_task(source.close())
        assert await reading == EXPECTED
        await destination.close()
        await closing
        assert sent == near.bytes_sent == far.bytes_received
        await listener.close()

    run(main())


async def test_the_wire_may_deliver_byte_by_byte():
    tape = Tape()
    await send_all(FramedConnection(tape))
    listener = await transport.listen("tcp://127.0.0.1:0")
    near, far = await asyncio.gather(transport.connect(listener.address), listener.accept())
    reading = asyncio.create_task(read_all(FramedConnection(far)))
    for i in range(700):  # all of HELLO, and the first block's head
        await near.send(tape.content[i : i + 1])
        while far.bytes_received <= i:
            await asyncio.sleep(0)
    await near.send(tape.content[700:])
    closing = asyncio.create_task(near.close())
    assert await reading == EXPECTED
    far.abort()
    await closing
    await listener.close()


async def test_a_snapshot_file_carries_the_same_frames(tmp_path):
    path = str(tmp_path / "s")
    writer = await file.create(path)
    await send_all(FramedConnection(writer))
    await writer.seal()
    reader = FramedConnection(await file.read(path))
    assert await read_all(reader, most=len(EXPECTED)) == EXPECTED
    await reader.close()


async def test_frames_are_sent_whole_whoever_sends():
    tape = Tape()
    link = FramedConnection(tape)
    async with asyncio.TaskGroup() as group:
        for seq in range(20):
            group.create_task(link.send_message(messages.Ping(seq=seq, sent_ns=0)))
            group.create_task(link.send_block(described(), PAGES[:2].data))
    came = await read_all(FramedConnection(tape))
    assert [m.seq for m in came if isinstance(m, messages.Ping)] == list(range(20))


async def test_nothing_is_read_for_a_frame_that_is_too_large():
    for kind in FrameType:
        asked = []
        head = struct.pack("<IBBHQ", 2**32 - 1, kind, 0, 0, 0)
        with pytest.raises(PeerError, match="allowed"):
            await FramedConnection(Tape(head, asked)).read_header()
        assert asked == [16]


async def test_nothing_is_read_for_a_block_that_lies():
    asked = []
    lying = struct.pack("<IIQIBBHIIII", 1, 0, 0, 2**32 - 1, 0, 0, 0, 1, 0, 4096, 4096)
    tape = Tape(frames.encode_header(FrameType.BLOCK, 4200, 0) + lying, asked)
    link = FramedConnection(tape)
    with pytest.raises(PeerError, match="a span of 4294967295 pages"):
        await link.read_block(await link.read_header(), MAP)
    assert asked == [16, 40]


@pytest.mark.parametrize("at", [20, 60, 75, 100, 3000, 8000])
async def test_a_damaged_block_is_noticed(at):
    tape = Tape()
    await FramedConnection(tape).send_block(described(), PAGES[:2].data)
    tape.content[at] ^= 0x10
    with pytest.raises(PeerError):
        await read_all(FramedConnection(tape))


async def test_live_pages_may_change_while_they_are_sent_but_not_what_describes_them():
    tape = Tape()
    await FramedConnection(tape).send_live_block(described(), pieces(PAGES, 0, 1))
    tape.content[1000] ^= 1
    (came,) = await read_all(FramedConnection(Tape(tape.content)))
    assert came[3] != PAGES[:2].tobytes()
    tape.content[56] ^= 0b100
    with pytest.raises(PeerError):
        await read_all(FramedConnection(Tape(tape.content)))


async def test_data_can_be_skipped():
    tape = Tape()
    link = FramedConnection(tape)
    await link.send_block(described(), PAGES[:2].data)
    await link.send_message(messages.Ping(seq=1, sent_ns=2))
    reader = FramedConnection(tape)
    await reader.read_block(await reader.read_header(), MAP)
    await reader.skip_data()
    assert await reader.receive() == messages.Ping(seq=1, sent_ns=2)


async def test_steps_in_the_wrong_order_are_our_own_error():
    tape = Tape()
    writer = FramedConnection(tape)
    await writer.send_block(described(), PAGES[:2].data)
    link = FramedConnection(tape)
    with pytest.raises(RuntimeError, match="no block's data"):
        await link.read_data(bytearray(1))
    with pytest.raises(RuntimeError, match="no block's data"):
        await link.skip_data()
    header = await link.read_header()
    with pytest.raises(RuntimeError, match="has not been read to its end"):
        await link.read_header()
    with pytest.raises(RuntimeError, match="BLOCK is not a control message"):
        await link.read_message(header)
    await link.read_block(header, MAP)
    with pytest.raises(RuntimeError, match="read_header comes first"):
        await link.read_payload(header)
    with pytest.raises(ValueError, match="100 bytes of memory for 8192"):
        await link.read_data(bytearray(100))
    with pytest.raises(ValueError, match="a block of 8192 bytes of data with 4096"):
        await writer.send_block(described(), PAGES[0].data)
    with pytest.raises(ValueError, match="a block of 8192 bytes of data with 4096"):
        await writer.send_live_block(described(), pieces(PAGES, 0))


async def test_a_block_where_a_message_is_due_is_refused():
    tape = Tape()
    await FramedConnection(tape).send_block(described(), PAGES[:2].data)
    with pytest.raises(PeerError, match="sent BLOCK where only control messages"):
        await FramedConnection(tape).receive()


async def test_who_sends_after_another_task_saw_the_connection_end_has_lost_it_and_broken_nothing():
    source = FramedConnection(Tape(), SourceProtocol())
    await source.send_message(HELLO)
    source.protocol.lost()
    with pytest.raises(LinkLost, match="has ended"):
        await source.send_block(described(), PAGES[:2].data)


async def test_frames_out_of_place_are_neither_sent_nor_read():
    tape = Tape()
    source = FramedConnection(tape, SourceProtocol())
    with pytest.raises(LocalProtocolError, match="about to send PING in state idle"):
        await source.send_message(messages.Ping(seq=0, sent_ns=0))
    assert not tape.content
    await source.send_message(HELLO)
    assert source.protocol.state is SourceState.HELLO_SENT
    destination = FramedConnection(Tape(tape.content), DestinationProtocol())
    assert await destination.receive() == HELLO
    await destination.send_message(WELCOME)

    early = FramedConnection(Tape(b"".join(frames.frame(FrameType.COMMIT, b"x" * 8))), DestinationProtocol())
    with pytest.raises(PeerError, match="sent COMMIT while the destination is in state idle"):
        await early.read_header()


@given(data=st.data())
def test_mutated_streams_end_in_a_peer_error_or_a_lost_link(data):
    async def main():
        tape = Tape()
        link = FramedConnection(tape)
        await link.send_message(HELLO)
        await link.send_block(described(), PAGES[:2].data)
        await link.send_block(described(0b1, 0b1))
        await link.send_message(messages.End(rounds=1, pages=3, zero_pages=1, state_bytes=0, state_digest=b""))
        content = tape.content
        for _ in range(data.draw(st.integers(1, 3))):
            # Mostly in the parts that say something; page data are one lump.
            at = data.draw(
                st.integers(0, 500)
                | st.integers(0, len(content) - 1)
                | st.integers(len(content) - 300, len(content) - 1)
            )
            content[at] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, 3))
        asked = []
        with contextlib.suppress(PeerError, LinkLost):
            await read_all(FramedConnection(Tape(content[: len(content) - cut * 7], asked)))
        assert max(asked) <= limits.MAX_BLOCK_DATA

    asyncio.run(main())


@given(st.binary(max_size=300))
def test_noise_ends_in_a_peer_error_or_a_lost_link(noise):
    async def main():
        with contextlib.suppress(PeerError, LinkLost):
            await read_all(FramedConnection(Tape(noise)))

    asyncio.run(main())
