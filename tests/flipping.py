"""A relay between two sides of a migration that understands frames, and flips one bit in one of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from amig.wire.frames import HEADER_SIZE, decode_header
from amig.wire.frametype import FrameType

Flip = Callable[[bytearray], int | None]
"""Takes a whole frame and returns the byte to flip a bit of; None leaves it as it is."""


class Flipping:
    """Relays one connection; in the first frame of ``kind`` that ``where`` accepts, bit 2 of one byte is flipped."""

    def __init__(self, target: str, kind: FrameType, where: Flip) -> None:
        self._host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._port = int(port)
        self._kind = kind
        self._where = where
        self.flipped = 0
        self.address = ""

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection(self._host, self._port)
        ways = [asyncio.create_task(self._relay(reader, here)), asyncio.create_task(self._relay(there, writer))]
        try:
            await asyncio.wait(ways)
        finally:
            for end in (here, writer):  # before anything is waited for: we may be cancelled a second time
                end.close()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            with contextlib.suppress(OSError):
                await here.wait_closed()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(HEADER_SIZE)
                header = decode_header(head)
                frame = bytearray(head + await reader.readexactly(header.length))
                if header.type is self._kind and not self.flipped:
                    at = self._where(frame)
                    if at is not None:
                        frame[at] ^= 4
                        self.flipped += 1
                writer.write(frame)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()


@asynccontextmanager
async def flipping(target: str, kind: FrameType, where: Flip) -> AsyncIterator[Flipping]:
    """Relay to ``target`` (tcp://) until the block ends; asserts that the bit was flipped."""
    relay = Flipping(target, kind, where)
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        tasks.add(asyncio.ensure_future(relay._accepted(reader, writer)))

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    relay.address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield relay
    finally:
        server.close()
        await server.wait_closed()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    assert relay.flipped == 1, "no frame was damaged"
