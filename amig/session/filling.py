"""Filling a guest from a source or a snapshot: pages through the pipeline, state put together, both checked."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence

from amig.digest import named
from amig.errors import LinkLost, MigrationError, PeerError, VerifyFailed
from amig.guest import Incoming
from amig.session import verify
from amig.session.streams import StreamSource
from amig.stages.pipeline import DestinationPipeline
from amig.stages.resumption import Placement
from amig.transport.framed import FramedConnection
from amig.wire.frames import FrameHeader
from amig.wire.frametype import FrameType
from amig.wire.messages import FULL_FEATURE, Abort, Digests, End, Hello, Ping, Pong
from amig.wire.state import StateAssembler


class Filling:
    """Takes everything between HELLO and END, over one set of connections or, where it ``keeps``, several in turn.

    The first connection of a set carries the control frames. What was said on a set that was lost counts no more, but
    for the pages that are in place.
    """

    def __init__(self, guest: Incoming, hello: Hello, *, workers: int, keeps: bool = False) -> None:
        self._guest = guest
        self._hello = hello
        self._workers = workers
        self._digests = verify.digests(hello.memory.regions, hello.digest_key)
        self._placed = asyncio.Condition()
        self.placement = Placement(hello.memory.regions, remember=keeps)

    def _begin(self, links: Sequence[FramedConnection]) -> list[StreamSource]:
        memory, first = self._hello.memory, self.placement.rounds
        self._links = links
        self._state = StateAssembler()
        wanted = (*self._hello.features_required, *self._hello.features_optional)
        self._full = verify.FullCheck(self._guest, self._hello) if FULL_FEATURE in wanted else None
        self._rounds = first
        self._end: End | None = None
        self._control = StreamSource(links[0], memory, self, first_round=first)
        return [self._control, *(StreamSource(link, memory, first_round=first) for link in links[1:])]

    async def receive(self, links: Sequence[FramedConnection], on_round: Callable[[int], Awaitable[None]]) -> None:
        """Place all pages; ``on_round`` is awaited after each round. Raises `VerifyFailed` if any is missing.

        Raises `LinkLost` when a connection is: everything that had come whole is in place then.
        """
        memory = self._hello.memory

        async def placed(round_: int) -> None:
            await on_round(round_)
            async with self._placed:
                self._rounds = round_ + 1
                self._placed.notify_all()

        sources = self._begin(links)
        pipeline = DestinationPipeline(
            self._guest,
            memory.regions,
            sources,
            workers=self._workers,
            on_round=placed,
            digests=self._digests,
            placement=self.placement,
        )
        await pipeline.run()
        if pipeline.lost:
            raise LinkLost(pipeline.lost)
        end = self._end
        assert end is not None  # noqa: S101 - the pipeline ends at END only
        got = (sources[0].rounds, pipeline.place.pages_placed, pipeline.place.pages_zero)
        if got != (end.rounds, end.pages, end.zero_pages):
            raise VerifyFailed(
                f"{end.pages} pages and {end.zero_pages} zero pages were sent in {end.rounds} rounds; "
                f"{got[1]} and {got[2]} in {got[0]} arrived"
            )
        self._verify(end)

    def _verify(self, end: End) -> None:
        """Compare memory, before anything is loaded: KVM writes into it when it gets its clocks."""
        if self._full is not None:
            self._full.finish()
        if self._digests is not None:
            differing = self._digests.differing(end.memory_roots)
            if differing:
                raise VerifyFailed(
                    f"guest memory as it was placed is not what was sent, in {named(differing)} "
                    "(with --verify full, the pages themselves are named)"
                )
        elif end.memory_roots:
            raise PeerError("the source sent digests that were not agreed on")

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
        if header.type is FrameType.DIGESTS and self._full is None:
            raise PeerError("the source sent digests that were not agreed on")
        message = await link.read_message(header)
        match message:
            case End():
                self._end = message
                return True
            case Digests() if self._full is not None:
                async with self._placed:  # what came before them may still be on its way to its place
                    await self._placed.wait_for(lambda: self._rounds >= self._control.rounds)
                self._full.compare(message)
            case Abort():
                raise MigrationError(f"the source gave up: {message.reason}")
            case Ping():
                await link.send_message(Pong(seq=message.seq, sent_ns=message.sent_ns))
            case _:
                pass
        return False
