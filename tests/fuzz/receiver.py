"""The whole destination side, fed with what a source sends after the handshake, or with a handshake of its own.

The first byte of an input: bits 0 and 1 say how many connections beside the first one, bit 2 that HELLO is part of the
input, bit 3 that it goes over a real socket, where the kernel writes to guest memory by address, bit 4 that the source
loses its only connection and comes back on another, which bits 5 to 7 are the round of. Each frame follows a byte that
says on which connection it comes.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import zstandard

from amig.digest import PageDigests, hash_all
from amig.errors import AmigError, HostError, LinkLost, Refused
from amig.memory import PAGE_SIZE, MemoryMap, Pages, Region, Slot
from amig.session.inbound import Inbound
from amig.transport.sock import SocketConnection
from amig.wire import block, frames, messages
from tests.modelguest import ArrayMemory, ModelIncoming

from . import streams
from .loops import complete
from .target import Mutate, Target

ID = "0123456789abcdef" * 2
WIDE, SMALL = 96 * PAGE_SIZE, 70 * PAGE_SIZE
MAP = MemoryMap(
    generation=3,
    regions=(Region(id=0, size=WIDE), Region(id=7, size=SMALL)),
    slots=(
        Slot(index=0, guest_phys=0, size=WIDE, region=0, offset=0),
        Slot(index=1, guest_phys=1 << 32, size=SMALL, region=7, offset=0),
    ),
)
MOST_MEMORY = 4 << 20
FENCE = 16
"""Pages around each region that nobody may write to."""
MARK = 0xA5
STREAMS, OWN_HELLO, SOCKET, RETURN = 3, 4, 8, 16
KEEP = 30.0
TAG = 1
KEY = b"a digest"
STAY = 0.05
"""Seconds that further connections stay open; far longer than the first one takes when it does not wait for them."""


class FencedMemory(ArrayMemory):
    """Regions with something before and after them that can be looked at."""

    def __init__(self, memory_map: MemoryMap) -> None:
        self.map = memory_map
        self.whole = {r.id: np.zeros((r.pages + 2 * FENCE, PAGE_SIZE), np.uint8) for r in memory_map.regions}
        self.arrays = {region: whole[FENCE:-FENCE] for region, whole in self.whole.items()}
        for whole in self.whole.values():
            whole[:FENCE] = whole[-FENCE:] = MARK

    def check(self) -> None:
        for whole in self.whole.values():
            assert (whole[:FENCE] == MARK).all(), "something was written before guest memory"
            assert (whole[-FENCE:] == MARK).all(), "something was written behind guest memory"


class FencedGuest(ModelIncoming):
    """A guest that arrives in fenced memory, and has only so much of it."""

    async def build(self, *, name: str, machine: bytes, memory: MemoryMap) -> str:
        self.calls.append("build")
        if memory.size > MOST_MEMORY:
            self.calls.pop()
            raise Refused("there is not so much memory here")
        self.array = FencedMemory(memory)
        return f"model/{name}"

    def pages(self, region: int) -> Pages:
        assert self.array is not None
        return self.array.arrays[region]

    def check_memory(self) -> None:
        if isinstance(self.array, FencedMemory):
            self.array.check()

    def check(self) -> None:
        """Nothing was written beside the guest; it runs only after everything that must come before, or not at all."""
        self.check_memory()
        if "run" in self.calls:
            assert self.calls[:4] == ["build", "load", "commit", "run"]
            assert "discard" not in self.calls
        elif "build" in self.calls:
            assert self.calls[-1] == "discard"
            assert "commit" not in self.calls


class Fed:
    """A connection on which a source has said it all, and then left."""

    gathers = False
    pages = None
    identity = b""
    peer = "a source"

    def __init__(self, said: bytes, stays: float = 0.0) -> None:
        """``stays``: seconds that it remains open when all has been said."""
        self._said = memoryview(said)
        self._stays = stays
        self.heard = bytearray()
        self.bytes_sent = self.bytes_received = 0

    async def send(self, *buffers: Any) -> None:
        await asyncio.sleep(0)
        for buffer in buffers:
            self.heard += memoryview(buffer).cast("B") if memoryview(buffer).nbytes else b""

    async def recv_into(self, *views: Any) -> None:
        await asyncio.sleep(0)
        for view in views:
            flat = memoryview(view).cast("B")
            part, self._said = self._said[: len(flat)], self._said[len(flat) :]
            flat[: len(part)] = part
            if len(part) < len(flat):
                await asyncio.sleep(self._stays)
                raise LinkLost("the source has gone")

    def outstanding(self) -> None:
        return None

    async def close(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def leave(self) -> None:
        pass


class FedSocket(SocketConnection):
    """The same over a pair of sockets."""

    def __init__(self, said: bytes) -> None:
        ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)
        self.theirs.sendall(said)
        self.theirs.shutdown(socket.SHUT_WR)
        super().__init__(ours, "a source")

    @property
    def heard(self) -> bytes:
        try:
            return self.theirs.recv(1 << 20, socket.MSG_PEEK)
        except (BlockingIOError, ConnectionResetError):
            return b""

    def leave(self) -> None:
        self.abort()
        self.theirs.close()


class Others:
    """A listener whose connections are those of the same source, which join it or come ``back`` with a round."""

    address = "here"

    def __init__(self, first: Fed | FedSocket, said: list[bytes], back: int | None = None) -> None:
        self._first = first
        self._said = said
        self._back = back
        self._stream = 0

    async def accept(self) -> Fed:
        self._stream += 1
        if self._stream > len(self._said):
            raise HostError("nobody else comes")
        token = token_of(bytes(self._first.heard))
        if self._back is not None:
            resume = messages.Resume(migration=ID, token=token, since=0, round=self._back)
            return Fed(streams.message(resume) + self._said[self._stream - 1])
        join = streams.message(messages.Join(migration=ID, token=token, stream=self._stream))
        return Fed(join + self._said[self._stream - 1], stays=STAY)

    async def close(self) -> None:
        pass


def token_of(heard: bytes) -> bytes:
    """Return the token in a WELCOME."""
    header = frames.decode_header(heard[:16])
    found = messages.decode(header.type, heard[16 : 16 + header.length])
    return found.token if isinstance(found, messages.Welcome) else bytes(32)


def connections(data: bytes) -> list[bytes]:
    """Return what is said on each connection."""
    said = [b""] * (2 if data[0] & RETURN else 1 + (data[0] & STREAMS))
    for piece in streams.cut(data[1:], TAG):
        said[piece[0] % len(said)] += piece[TAG:]
    return said


def hello(streams_: int, *features: str, optional: tuple[str, ...] = ()) -> bytes:
    return streams.message(
        messages.Hello(
            migration=ID,
            name="web1",
            engine="model",
            vcpus=1,
            memory=MAP,
            machine=b"model",
            streams=streams_,
            features_required=features,
            features_optional=optional,
            digest_key=KEY if features else b"",
        )
    )


async def receive(data: bytes) -> FencedGuest:
    """Be the destination of such a source; returns the guest, checked."""
    said = connections(data)
    back = data[0] >> 5 if data[0] & RETURN else None
    if back is not None:
        said[0] = hello(1, optional=(messages.RESUME_FEATURE,)) + said[0]
    elif not data[0] & OWN_HELLO:
        said[0] = hello(len(said)) + said[0]
    guest = FencedGuest()
    first = FedSocket(said[0]) if data[0] & SOCKET else Fed(said[0])
    try:
        try:
            others = Others(first, said[1:], back)
            await Inbound(first, others, guest, release="test", keep=KEEP if back is not None else 0).run()
        except AmigError:
            assert "run" not in guest.calls, "the guest runs, and an error was raised"
        else:
            assert "run" in guest.calls, "neither a guest nor an error"
        assert len(first.heard) <= 4096 + 2 * len(data), "more was answered than asked"
    finally:
        first.leave()
    guest.check()
    return guest


def run(data: bytes) -> None:
    if data:
        with patch.dict(os.environ, XDG_STATE_HOME="/proc/none"):  # no records are found, and none are left behind
            complete(receive(data))


def mutate(data: bytes, most: int, seed: int, by: Mutate) -> bytes:
    return streams.mutate(data, most, seed, by, skip=1, tag=TAG)


def tagged(stream: bytes, connection: int = 0) -> bytes:
    """Return the frames of a stream, each with the number of its connection before it."""
    return b"".join(bytes([connection]) + piece for piece in streams.cut(stream))


def a_block(content: bytes, *, packed: bool = False, summed: bool = True, **changes: Any) -> bytes:
    """Return a BLOCK of pages 1 (zero) and 2, 3 (with ``content``) of region 0 unless told otherwise."""
    fields: dict[str, Any] = {"round": 0, "region": 0, "first_page": 0, "span_pages": 64}
    fields |= {"pages": np.array([0b1110], np.uint64), "zero": np.array([0b0010], np.uint64)}
    if packed:
        content = zstandard.compress(content)
        fields |= {"codec": block.Codec.ZSTD, "data_bytes": len(content)}
    return streams.block(block.describe(**(fields | changes)), content, summed=summed)


def one_page(number: int, content: bytes, **changes: Any) -> bytes:
    """Return a BLOCK of one page."""
    first = number // 64 * 64
    bit = np.array([1 << number % 64], np.uint64)
    fields = {"first_page": first, "span_pages": number - first + 1, "pages": bit, "zero": bit & np.uint64(0)}
    return a_block(content, **(fields | changes))


def round_end(number: int, pages: int) -> bytes:
    return streams.message(messages.Round(round=number, pages=pages))


def last_words(rounds: int, pages: int, zero_pages: int) -> bytes:
    """Return STATE, END and COMMIT."""
    commit = streams.message(messages.Commit(migration=ID))
    return streams.state(b"state") + streams.end(rounds, pages, zero_pages, b"state") + commit


def proven(*features: str) -> bytes:
    """Return a whole migration of one page whose digests are compared; they are right."""
    memory = {region.id: np.zeros((region.pages, PAGE_SIZE), np.uint8) for region in MAP.regions}
    memory[0][5] = np.arange(PAGE_SIZE) % 251
    told = PageDigests(MAP.regions, int.from_bytes(KEY, "little"))
    told.hash(0, memory[0], np.array([5]))
    said = hello(1, *features) + one_page(5, memory[0][5].tobytes(), packed=True) + round_end(0, 1)
    said += streams.state(b"state")
    if messages.FULL_FEATURE in features:
        for region, pages in memory.items():
            found = hash_all(pages, 0, np.ones(len(pages), np.bool_), int.from_bytes(KEY, "little"))
            said += streams.message(messages.Digests(region=region, first=0, digests=found.tobytes()))
    said += streams.end(1, 1, 0, b"state", told.roots())
    return said + streams.message(messages.Commit(migration=ID))


def seeds() -> Iterator[tuple[str, bytes]]:
    text = b"text".ljust(16) * 256
    ping = streams.message(messages.Ping(seq=1, sent_ns=2))
    abort = streams.message(messages.Abort(code="failed", reason="a reason"))
    whole = a_block(2 * text, packed=True) + ping + round_end(0, 3) + last_words(1, 2, 1)
    yield "whole", bytes([0]) + tagged(whole)
    yield "whole-socket", bytes([SOCKET]) + tagged(whole)
    raw = one_page(5, text) + one_page(69, text, region=7, summed=False) + round_end(0, 2) + last_words(1, 2, 0)
    yield "raw", bytes([0]) + tagged(raw)
    yield "raw-socket", bytes([SOCKET]) + tagged(raw)
    again = one_page(5, text, packed=True) + round_end(0, 1) + one_page(5, text, packed=True, round=1)
    again += one_page(6, b"", round=1, zero=np.array([1 << 6], np.uint64)) + round_end(1, 2) + last_words(2, 2, 1)
    yield "two-rounds", bytes([0]) + tagged(again)
    difference = zstandard.compress(bytes(100) + b"change" + bytes(PAGE_SIZE - 106))
    delta = {"round": 1, "codec": block.Codec.XOR_ZSTD, "data_bytes": len(difference)}
    changed = one_page(5, text) + round_end(0, 1) + one_page(5, difference, **delta) + round_end(1, 1)
    yield "difference", bytes([0]) + tagged(changed + last_words(2, 2, 0))
    late = streams.state(b"state") + one_page(5, text, packed=True) + round_end(0, 1)
    late += streams.end(1, 1, 0, b"state") + streams.message(messages.Commit(migration=ID))
    yield "state-first", bytes([0]) + tagged(late)
    three = tagged(one_page(1, text, packed=True) + round_end(0, 1))
    three += tagged(one_page(2, text, packed=True) + round_end(0, 1), 1) + tagged(round_end(0, 0), 2)
    yield "three-connections", bytes([2]) + three + tagged(last_words(1, 2, 0))
    yield "abort", bytes([0]) + tagged(a_block(2 * text, packed=True) + abort)
    yield "own-hello", bytes([OWN_HELLO]) + tagged(hello(1) + round_end(0, 0) + last_words(1, 0, 0))
    yield "digests", bytes([OWN_HELLO]) + tagged(proven(messages.DIGESTS_FEATURE))
    yield "digests-full", bytes([OWN_HELLO]) + tagged(proven(messages.DIGESTS_FEATURE, messages.FULL_FEATURE))
    half = tagged(one_page(5, text) + round_end(0, 1) + one_page(6, text, round=1) + one_page(7, text, round=1)[:-9])
    again = one_page(7, text, round=3) + one_page(69, text, region=7, round=3) + round_end(3, 2)
    # The torn frame comes last: its length would take in what follows.
    yield "return", bytes([RETURN | 3 << 5]) + tagged(again + last_words(4, 2, 0), 1) + half
    late = one_page(5, text, packed=True) + round_end(0, 1) + streams.state(b"state")
    yield "return-late", bytes([RETURN | SOCKET | 2 << 5]) + tagged(late) + tagged(last_words(2, 0, 0), 1)
    yield "query", bytes([OWN_HELLO]) + tagged(streams.message(messages.Query(migration=ID)))


TARGET = Target(name="receiver", run=run, seeds=seeds, most=12 << 10, memory=48 << 20, mutate=mutate)
