"""Frames over a connection: the thin shell around `amig.wire` that does the reading and writing.

A frame is read in steps, each of a size that was checked before anything is allocated for it::

    header = await link.read_header()
    if header.type is FrameType.BLOCK:
        block = await link.read_block(header, memory_map)
        await link.read_data(view)              # straight to where the caller wants it
    elif header.type is FrameType.STATE:
        complete = assembler.add(await link.read_payload(header))
    else:
        message = await link.read_message(header)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from amig.errors import LinkLost, PeerError
from amig.memory import MemoryMap
from amig.pieces import Pieces
from amig.transport.base import Connection
from amig.wire import block as blocks
from amig.wire import frames, messages, state
from amig.wire.block import BlockFrame
from amig.wire.frames import BLOCK_HEADER_SIZE, HEADER_SIZE, UNSUMMED_DATA, Checksum, FrameHeader
from amig.wire.frametype import FrameType
from amig.wire.messages import Message
from amig.wire.states import LocalProtocolError, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WASTE_BYTES: Final = 1 << 16
_LAST_WORDS: Final = frozenset({FrameType.ABORT, FrameType.REFUSE})
"""After these the peer takes nothing more."""


class FramedConnection:
    """One connection, frame by frame. Any number of tasks may send (whole frames, in turn), one may read.

    ``protocol`` is this end's state: every frame passes it, and one out of place raises `LocalProtocolError` (ours)
    or `PeerError` (theirs) instead of being sent or read. Reading raises `LinkLost` when the connection ends and
    `PeerError` for what no peer may send; after either, only `close` and `abort` make sense. Sending raises `LinkLost`,
    too, once the peer has begun to say that it gives up.
    """

    def __init__(self, connection: Connection, protocol: Protocol[Any] | None = None) -> None:
        self.connection = connection
        self.protocol = protocol
        self._turn = asyncio.Lock()
        self._head = bytearray(HEADER_SIZE)
        self._block_head = bytearray(BLOCK_HEADER_SIZE)
        self._frame: FrameHeader | None = None
        self._block: BlockFrame | None = None
        self._sum: Checksum | None = None
        self._refused = False

    @property
    def peer(self) -> str:
        """Who is at the other end, for people."""
        return self.connection.peer

    async def send_message(self, message: Message) -> int:
        """Send a control message and return its bytes on the wire."""
        payload = messages.encode(message)
        kind = messages.frame_type(message)
        await self._send(kind, *frames.frame(kind, payload))
        return HEADER_SIZE + len(payload)

    async def send_block(self, block: BlockFrame, *data: Buffer) -> int:
        """Send a block whose data are these buffers, gathered in order, and return its bytes on the wire.

        The buffers may be reused once this has returned.
        """
        head = block.header
        size = sum([memoryview(d).nbytes for d in data])
        if size != head.data_bytes:
            raise ValueError(f"a block of {head.data_bytes} bytes of data with {size} bytes of data")
        start = _block_start(block, *data)
        await self._send(FrameType.BLOCK, start, *data)
        return HEADER_SIZE + head.payload_bytes

    async def send_live_block(self, block: BlockFrame, pieces: Pieces) -> int:
        """As `send_block`, of guest memory as it lies: over connections that move pages only.

        Header and bitmaps are summed, the data not: the guest may write between the checksum's read and the kernel's
        copy.
        """
        head = block.header
        if pieces.nbytes != head.data_bytes:
            raise ValueError(f"a block of {head.data_bytes} bytes of data with {pieces.nbytes} bytes of data")
        mover = self.connection.pages
        if mover is None:
            raise RuntimeError(f"the connection to {self.peer} has to look at what it sends")
        start = _block_start(block, flags=UNSUMMED_DATA)
        async with self._turn:
            self._going_out(FrameType.BLOCK)
            await mover.send_pieces(start, pieces)
        return HEADER_SIZE + head.payload_bytes

    async def send_state(self, content: bytes) -> int:
        """Send device and vCPU state in as many frames as it takes, and return their bytes on the wire."""
        total = 0
        for head, part in state.split(content):
            length = len(head) + len(part)
            header = frames.encode_header(FrameType.STATE, length, frames.checksum(FrameType.STATE, length, head, part))
            await self._send(FrameType.STATE, header + head, part)
            total += HEADER_SIZE + length
        return total

    async def read_header(self) -> FrameHeader:
        """Return the next frame's header, checked against limits and state; its payload is read next.

        Cancelled before the first byte of the frame came, it has done nothing.
        """
        if self._frame is not None or self._block is not None:
            raise RuntimeError("the frame before has not been read to its end")
        await self.connection.recv_into(self._head)
        header = frames.decode_header(self._head)
        if self.protocol is not None:
            self.protocol.received(header.type)
        self._refused = self._refused or header.type in _LAST_WORDS
        self._frame = header
        return header

    async def read_payload(self, header: FrameHeader) -> bytearray:
        """Return the whole payload of a frame that is not a BLOCK, its checksum verified."""
        self._expect(header)
        payload = bytearray(header.length)
        await self.connection.recv_into(payload)
        frames.verify(header, frames.checksum(header.type, header.length, payload, flags=header.flags))
        self._frame = None
        return payload

    async def read_message(self, header: FrameHeader) -> Message:
        """Return the control message whose header was read."""
        if header.type in (FrameType.BLOCK, FrameType.STATE):
            raise RuntimeError(f"{header.type.name} is not a control message")
        return messages.decode(header.type, await self.read_payload(header))

    async def read_block(self, header: FrameHeader, memory: MemoryMap) -> BlockFrame:
        """Return the block whose header was read, except its data, which must be read (or skipped) next.

        A block without data is verified and done.
        """
        self._expect(header)
        await self.connection.recv_into(self._block_head)
        head = blocks.decode_header(self._block_head, header, memory)
        bitmaps = bytearray(2 * head.bitmap_bytes)
        await self.connection.recv_into(bitmaps)
        block = blocks.decode_bitmaps(head, bitmaps)
        self._sum = Checksum(header.type, header.length, header.flags)
        self._sum.update(self._block_head)
        self._sum.update(bitmaps)
        if not head.data_bytes or not header.data_is_summed:
            frames.verify(header, self._sum.value())
        if head.data_bytes:
            self._block = block
        else:
            self._frame = None
        return block

    async def read_data(self, data: Buffer | Pieces) -> None:
        """Fill ``data``, ``data_bytes`` long, with the data of the block read last, and verify the checksum.

        The memory has been written when a damaged block raises `PeerError`.
        """
        frame, block, total = self._frame, self._block, self._sum
        if frame is None or block is None or total is None:
            raise RuntimeError("no block's data is to be read")
        size = data.nbytes if isinstance(data, Pieces) else memoryview(data).nbytes
        if size != block.header.data_bytes:
            raise ValueError(f"{size} bytes of memory for {block.header.data_bytes} bytes of data")
        mover = self.connection.pages
        if isinstance(data, Pieces) and mover is not None and not frame.data_is_summed:
            await mover.recv_pieces(data)
        else:
            views: Sequence[Buffer] = data.views() if isinstance(data, Pieces) else (data,)
            await self.connection.recv_into(*views)
            if frame.data_is_summed:
                for view in views:
                    total.update(view)
                frames.verify(frame, total.value())
        self._frame = self._block = self._sum = None

    async def skip_data(self) -> None:
        """Read the data of the block read last and throw it away; its checksum is not looked at."""
        if self._block is None:
            raise RuntimeError("no block's data is to be read")
        left = self._block.header.data_bytes
        waste = memoryview(bytearray(min(left, _WASTE_BYTES)))
        while left:
            part = waste[: min(left, len(waste))]
            await self.connection.recv_into(part)
            left -= len(part)
        self._frame = self._block = self._sum = None

    async def receive(self) -> Message:
        """Return the next frame, which must be a control message; raises `PeerError` for a BLOCK or STATE."""
        header = await self.read_header()
        if header.type in (FrameType.BLOCK, FrameType.STATE):
            raise PeerError(f"the peer sent {header.type.name} where only control messages are expected")
        return await self.read_message(header)

    async def close(self) -> None:
        """Close the connection, letting the peer read what was sent."""
        await self.connection.close()

    def abort(self) -> None:
        """Drop the connection at once."""
        self.connection.abort()

    async def _send(self, kind: FrameType, *parts: Buffer) -> None:
        async with self._turn:
            self._going_out(kind)
            await self.connection.send(*parts)

    def _going_out(self, kind: FrameType) -> None:
        if self.protocol is None:
            return
        try:
            self.protocol.sent(kind)
        except LocalProtocolError:
            if self._refused:  # it came while this was being made: no bug, and its reason is about to be read
                raise LinkLost(f"{self.peer} has given up") from None
            if self.protocol.ended:  # another task saw the end of the connection first
                raise LinkLost(f"the connection to {self.peer} has ended") from None
            raise

    def _expect(self, header: FrameHeader) -> None:
        if header is not self._frame or self._block is not None:
            raise RuntimeError("read_header comes first, then the payload of that very frame")


def _block_start(block: BlockFrame, *summed: Buffer, flags: int = 0) -> bytes:
    """Return all of a block's frame that comes before its data; the checksum covers ``summed``, too."""
    length = block.header.payload_bytes
    own = b"".join((blocks.encode_header(block.header), block.pages.data, block.zero.data))
    total = frames.checksum(FrameType.BLOCK, length, own, *summed, flags=flags)
    return frames.encode_header(FrameType.BLOCK, length, total, flags) + own
