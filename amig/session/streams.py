"""Joins the stages to the wire: blocks on a framed connection, going out and coming in."""

from __future__ import annotations

from typing import Protocol

from amig.errors import PeerError
from amig.memory import MemoryMap, Pages
from amig.pieces import Pieces
from amig.stages.items import Block, Codec, RoundEnd
from amig.stages.receive import Landing
from amig.transport.framed import FramedConnection
from amig.wire import block as wire_block
from amig.wire.frames import FrameHeader
from amig.wire.frametype import FrameType
from amig.wire.messages import Round


class StreamSink:
    """`amig.stages.send.BlockSink` on one connection."""

    def __init__(self, link: FramedConnection, *, live: bool = False) -> None:
        self.live = live
        self._link = link
        self._pages = 0

    async def send_block(self, block: Block) -> int:
        """Send a block; returns its bytes on the wire."""
        self._pages += block.data_pages + block.zero_pages
        frame = wire_block.describe(
            round=block.round,
            region=block.region,
            first_page=block.first,
            span_pages=block.span,
            pages=block.pages,
            zero=block.zero,
            codec=wire_block.Codec(block.codec),
            data_bytes=block.size,
        )
        if isinstance(block.data, Pieces):
            return await self._link.send_live_block(frame, block.data)
        return await self._link.send_block(frame, *(() if block.data is None else (block.data,)))

    async def send_round(self, end: RoundEnd) -> None:
        """Say that the round is over on this connection."""
        await self._link.send_message(Round(round=end.round, pages=self._pages))
        self._pages = 0


class Control(Protocol):
    """Takes the frames of the first connection that are neither blocks nor rounds."""

    async def frame(self, header: FrameHeader) -> bool:
        """Read and handle a frame's payload; returns True when everything has been sent."""


class StreamSource:
    """`amig.stages.receive.BlockSource` on one connection.

    Checks that rounds follow one another and that each carried as many pages as its end says; ``control`` gets all
    other frames, and is None on the further connections, where none may come.
    """

    def __init__(
        self, link: FramedConnection, memory: MemoryMap, control: Control | None = None, *, first_round: int = 0
    ) -> None:
        self._link = link
        self._memory = memory
        self._control = control
        self._round = first_round
        self._pages = 0

    @property
    def rounds(self) -> int:
        """Number of the round under way here."""
        return self._round

    async def receive(self, buffer: Pages, landing: Landing) -> Block | RoundEnd | None:
        """Return the next block or round end; None after END."""
        while True:
            header = await self._link.read_header()
            match header.type:
                case FrameType.BLOCK:
                    return await self._block(header, buffer, landing)
                case FrameType.ROUND:
                    return await self._end(header)
                case _ if self._control is None:
                    raise PeerError(f"the peer sent {header.type.name} on a connection that carries memory only")
                case _:
                    if await self._control.frame(header):
                        return None

    async def _block(self, header: FrameHeader, buffer: Pages, landing: Landing) -> Block:
        frame = await self._link.read_block(header, self._memory)
        head = frame.header
        if head.round != self._round:
            raise PeerError(f"the peer sent a block of round {head.round} in round {self._round}")
        data: memoryview | None = None
        pieces: Pieces | None = None
        if head.data_bytes:
            pieces = landing.land(head.round, head.region, head.first_page, frame.with_data) if not head.codec else None
            if pieces is not None:
                try:
                    await self._link.read_data(pieces)
                except BaseException:
                    landing.spoil(head.region, head.first_page, frame.with_data)
                    raise
            else:
                data = buffer.reshape(-1).data[: head.data_bytes]
                await self._link.read_data(data)
        self._pages += head.data_pages + head.zero_pages
        return Block(
            round=head.round,
            region=head.region,
            first=head.first_page,
            span=head.span_pages,
            pages=frame.pages,
            zero=frame.zero,
            data_pages=head.data_pages,
            zero_pages=head.zero_pages,
            codec=Codec(head.codec),
            data=data,
            size=head.data_bytes if data is not None else 0,
            buffer=buffer if data is not None else None,
            index=pieces.index if pieces is not None else None,
        )

    async def _end(self, header: FrameHeader) -> RoundEnd:
        message = await self._link.read_message(header)
        assert isinstance(message, Round)  # noqa: S101 - the frame's type was checked
        if message.round != self._round or message.pages != self._pages:
            raise PeerError(
                f"the peer ended round {message.round} with {message.pages} pages; "
                f"here round {self._round} has {self._pages}"
            )
        self._round += 1
        self._pages = 0
        return RoundEnd(round=message.round)
