"""Filling a guest from a source or a snapshot: pages through the pipeline, state put together, both checked."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence

from amig.errors import MigrationError, VerifyFailed
from amig.guest import Incoming
from amig.session.streams import StreamSource
from amig.stages.pipeline import DestinationPipeline
from amig.transport.framed import FramedConnection
from amig.wire.frames import FrameHeader
from amig.wire.frametype import FrameType
from amig.wire.messages import Abort, End, Hello, Ping, Pong
from amig.wire.state import StateAssembler


class Filling:
    """Takes everything between HELLO and END. The first connection carries the control frames."""

    def __init__(self, guest: Incoming, hello: Hello, links: Sequence[FramedConnection], *, workers: int) -> None:
        self._guest = guest
        self._hello = hello
        self._links = links
        self._workers = workers
        self._state = StateAssembler()
        self._end: End | None = None

    async def receive(self, on_round: Callable[[int], Awaitable[None]]) -> None:
        """Place all pages; ``on_round`` is awaited after each round. Raises `VerifyFailed` if any is missing."""
        memory = self._hello.memory
        sources = [StreamSource(self._links[0], memory, self)]
        sources += [StreamSource(link, memory) for link in self._links[1:]]
        pipeline = DestinationPipeline(self._guest, memory.regions, sources, workers=self._workers, on_round=on_round)
        await pipeline.run()
        end = self._end
        assert end is not None  # noqa: S101 - the pipeline ends at END only
        got = (sources[0].rounds, pipeline.place.pages_placed, pipeline.place.pages_zero)
        if got != (end.rounds, end.pages, end.zero_pages):
            raise VerifyFailed(
                f"{end.pages} pages and {end.zero_pages} zero pages were sent in {end.rounds} rounds; "
                f"{got[1]} and {got[2]} in {got[0]} arrived"
            )

    async def load(self) -> None:
        """Check device and vCPU state and give it to the guest. Raises `VerifyFailed`."""
        end = self._end
        assert end is not None  # noqa: S101 - receive comes first
        state = self._state.take()
        if len(state) != end.state_bytes or hashlib.blake2b(state, digest_size=32).digest() != end.state_digest:
            raise VerifyFailed("the device state that arrived is not what the source sent")
        await self._guest.load(state)

    async def frame(self, header: FrameHeader) -> bool:
        """Handle a frame of the first connection that is not memory; True at END."""
        link = self._links[0]
        if header.type is FrameType.STATE:
            self._state.add(await link.read_payload(header))
            return False
        message = await link.read_message(header)
        match message:
            case End():
                self._end = message
                return True
            case Abort():
                raise MigrationError(f"the source gave up: {message.reason}")
            case Ping():
                await link.send_message(Pong(seq=message.seq, sent_ns=message.sent_ns))
            case _:
                pass
        return False
