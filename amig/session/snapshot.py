"""A snapshot file as the destination: a one-way peer, so there is no handover; the file is sealed instead."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from amig.errors import UsageError
from amig.guest import Outcome
from amig.session.destination import Placed
from amig.session.streams import StreamSink
from amig.stages.items import RoundEnd
from amig.stages.resumption import Answer
from amig.stages.send import BlockSink
from amig.transport.file import FileWriter, create
from amig.transport.framed import FramedConnection
from amig.transport.partial import check_space
from amig.wire.messages import Digests, End, Hello
from amig.wire.states import SnapshotWriterProtocol


class SnapshotFile:
    """`Destination` that writes a file; it has its name only once it is complete and on disk."""

    one_way = True
    parallel = False
    no_return = "a file can't be written to again"

    def __init__(self, path: str) -> None:
        self.address = f"file:{path}"
        self._path = path
        self._writer: FileWriter | None = None
        self._link: FramedConnection | None = None

    async def open(self, hello: Hello) -> str:
        """Create the partial file and write what the guest is; raises `SnapshotError` where it can't fit."""
        if hello.compression == "none":  # else nobody knows before how much it will be
            await asyncio.to_thread(check_space, self._path, hello.memory_used)
        self._writer = await create(self._path)
        self._link = FramedConnection(self._writer, SnapshotWriterProtocol())
        await self._link.send_message(hello)
        return self.address

    async def round_trip(self) -> float:
        """None is made."""
        return 0.0

    def sinks(self, placed: Placed) -> Sequence[BlockSink]:
        """Return the one sink; a round counts as placed once it was written."""
        assert self._link is not None  # noqa: S101 - open comes first
        return [_FileSink(self._link, placed)]

    async def listen(self) -> None:
        """A file says nothing: waits until cancelled."""
        await asyncio.get_running_loop().create_future()

    async def keep_alive(self) -> None:
        """A disk has all the time that it needs."""
        await asyncio.get_running_loop().create_future()

    async def resume(self, since: int, round_: int) -> Answer:
        """Never called, by `no_return`."""
        raise UsageError(self.no_return)

    async def finish(self, state: bytes, pages: Iterable[Digests], end: End) -> None:
        """Write state, digests and END."""
        assert self._link is not None  # noqa: S101 - as above
        await self._link.send_state(state)
        for some in pages:
            await self._link.send_message(some)
            await asyncio.sleep(0)
        await self._link.send_message(end)

    async def commit(self, migration: str) -> Outcome:
        """Flush to the disk and give the file its name."""
        assert self._writer is not None  # noqa: S101 - as above
        await self._writer.seal()
        return Outcome.RUNNING

    async def settled(self) -> None:
        """A file need not be told."""

    async def abort(self, code: str, reason: str) -> None:
        """Remove the partial file."""
        if self._writer is not None:
            self._writer.abort()

    async def close(self) -> None:
        """Close the file; removes it unless it was sealed."""
        if self._writer is not None:
            await self._writer.close()


class _FileSink(StreamSink):
    def __init__(self, link: FramedConnection, placed: Placed) -> None:
        super().__init__(link)
        self._placed = placed

    async def send_round(self, end: RoundEnd) -> None:
        await super().send_round(end)
        self._placed(end.round)
