"""TAKE-AND-CLEAR, and SYNC, on a socket and a thread of their own.

The time between a take and the copy of its last page is the window that lazy clearing exists to shorten, and the time
between the last take of a round and the next sync is what a short round consists of: neither must wait for the host's
event loop. Packets of fixed size go over a SOCK_SEQPACKET pair: the requests in order, one reply each in the same
order. The words of a take appear in the shared ``taken`` bitmap, at the range's own place, those of a sync in the
shared ``pending`` bitmaps, before the reply is sent. The migrator may have several takes outstanding.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import socket
import struct
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from amig.aio import settle
from amig.bitmap import count as count_bits
from amig.control.bitmaps import BitmapReader, SharedBitmaps
from amig.errors import AmigError, ControlError
from amig.memory import WORD_PAGES, MemoryMap, Words
from amig.promptness import be_prompt

REQUEST = struct.Struct("<IIQQQQ")
"""op, region, first page, pages, generation, sequence; a sync has zeros from region to generation."""
REPLY = struct.Struct("<QIIQ")
"""sequence, status, pages only possibly dirty, pages taken; UTF-8 text of an error may follow."""

OP_TAKE = 1
OP_SYNC = 2
MAX_OUTSTANDING = 16
MAX_ERROR_TEXT = 1024

_log = logging.getLogger(__name__)


class Status(enum.IntEnum):
    """What a reply says; everything but OK carries a text."""

    OK = 0
    BAD_REQUEST = 1
    STALE_GENERATION = 2
    FAILED = 3


_CODES = {
    Status.BAD_REQUEST: "bad-range",
    Status.STALE_GENERATION: "stale-generation",
    Status.FAILED: "error",
}
_STATUS = {code: status for status, code in _CODES.items()}


def check_range(memory: MemoryMap, region: int, first: int, count: int) -> None:
    """Raise `ControlError` (``bad-range``) unless a take of that range is allowed (design rule 3)."""
    found = next((r for r in memory.regions if r.id == region), None)
    if found is None:
        raise ControlError(f"the guest has no memory region {region}", code="bad-range")
    end = first + count
    whole = first % WORD_PAGES == 0 and (count % WORD_PAGES == 0 or end == found.pages)
    if first < 0 or count <= 0 or end > found.pages or not whole:
        raise ControlError(
            f"pages {first} to {end} of region {region} ({found.pages} pages) can't be taken: ranges begin and end at "
            f"multiples of {WORD_PAGES} pages, or at the region's end",
            code="bad-range",
        )


class Taker(Protocol):
    """The part of `amig.dirty.log.LogUser` that this file needs."""

    def take_apart(self, region: int, first: int, count: int, generation: int) -> tuple[Words, Words]:
        """Take the pending bits of a range and clear them in the kernel, as one atomic step.

        The second bitmap has those that are only possibly dirty.
        """

    def sync(self, into: Mapping[int, Words] | None = None) -> Mapping[int, Words]:
        """Ask the kernel what is dirty; all pending bits are left in ``into``, by region."""


class TakeServer:
    """The host's end: one thread that answers one user's packets until either end closes."""

    def __init__(self, user: Taker, bitmaps: SharedBitmaps, memory: MemoryMap) -> None:
        self._user = user
        self._bitmaps = bitmaps
        self._memory = memory
        self._sock, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread = threading.Thread(target=self._serve, name="amig-take", daemon=True)

    def start(self) -> None:
        """Begin to serve. ``peer`` is the migrator's end: detach it and pass it on."""
        self._thread.start()

    def close(self) -> None:
        """Stop and wait for the thread; blocks for at most one take. Idempotent."""
        self.peer.close()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join()
        self._sock.close()

    def _serve(self) -> None:
        be_prompt()
        while True:
            try:
                packet = self._sock.recv(REQUEST.size + 1)
                if not packet:
                    return
                self._sock.sendall(self._answer(packet))
            except OSError:
                return  # the migrator has gone; its control connection tells the rest

    def _answer(self, packet: bytes) -> bytes:
        if len(packet) != REQUEST.size:
            return REPLY.pack(0, Status.BAD_REQUEST, 0, 0) + b"a take request of a wrong size"
        op, region, first, count, generation, sequence = REQUEST.unpack(packet)
        if op not in (OP_TAKE, OP_SYNC):
            return REPLY.pack(sequence, Status.BAD_REQUEST, 0, 0) + b"an unknown operation on the take socket"
        try:
            if op == OP_SYNC:
                self._user.sync(self._bitmaps.pending)
                return REPLY.pack(sequence, Status.OK, 0, 0)
            check_range(self._memory, region, first, count)
            words, possible = self._user.take_apart(region, first, count, generation)
        except Exception as error:  # whatever went wrong, the migrator has to hear of it and this thread goes on
            if not isinstance(error, AmigError):
                _log.exception("take or sync failed")
            status = _STATUS.get(getattr(error, "code", ""), Status.FAILED)
            return REPLY.pack(sequence, status, 0, 0) + str(error).encode()[:MAX_ERROR_TEXT]
        start = first // WORD_PAGES
        self._bitmaps.taken[region][start : start + len(words)] = words
        return REPLY.pack(sequence, Status.OK, min(count_bits(possible), 2**32 - 1), count_bits(words))


_NONE: Words = np.empty(0, np.uint64)
Taken = tuple[Words, int]
"""The pages taken, and how many of them are only possibly dirty."""


@dataclass(slots=True)
class _Call:
    sequence: int
    region: int
    first: int
    words: int
    done: asyncio.Future[Taken]


class TakeClient:
    """The migrator's end: sends packets, matches replies in order. Owns ``sock``."""

    def __init__(
        self, sock: socket.socket, bitmaps: BitmapReader, memory: MemoryMap, *, generation: int, timeout: float
    ) -> None:
        self._sock = sock
        self._timeout = timeout
        self._sock.setblocking(False)
        self._bitmaps = bitmaps
        self._memory = memory
        self._generation = generation
        self._sequence = 0
        self._calls: deque[_Call] = deque()
        self._room = asyncio.Semaphore(MAX_OUTSTANDING)
        self._closed: ControlError | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._read)
        self._watch = self._loop.call_later(timeout, self._look, 0)

    async def sync(self) -> None:
        """Have ``pending`` brought up to date; see `amig.guest.Guest.sync`. Cancelled, it is waited for first."""
        _, cancelled = await self._call(OP_SYNC, 0, 0, 0)
        if cancelled is not None:
            raise cancelled

    async def take(self, region: int, first: int, count: int) -> tuple[Taken, asyncio.CancelledError | None]:
        """Take a range; see `amig.guest.Guest.take_and_clear`.

        A call under way is waited for even when cancelled: then the cancellation is returned beside the words, which
        the caller gives back before it raises it.
        """
        check_range(self._memory, region, first, count)
        return await self._call(OP_TAKE, region, first, count)

    async def _call(self, op: int, region: int, first: int, count: int) -> tuple[Taken, asyncio.CancelledError | None]:
        async with self._room:
            call = self._send(op, region, first, count)
            cancelled = await settle(call.done)
            if cancelled is not None and call.done.exception() is not None:
                raise cancelled
            return call.done.result(), cancelled

    def _send(self, op: int, region: int, first: int, count: int) -> _Call:
        if self._closed is not None:
            raise self._closed
        self._sequence += 1
        words = -(-count // WORD_PAGES)
        call = _Call(self._sequence, region, first // WORD_PAGES, words, self._loop.create_future())
        try:
            # never would block: the socket's buffer holds far more than MAX_OUTSTANDING packets
            generation = self._generation if op == OP_TAKE else 0
            self._sock.send(REQUEST.pack(op, region, first, count, generation, self._sequence))
        except OSError as error:
            self._fail(f"the take socket broke: {error.strerror}")
            assert self._closed is not None  # noqa: S101 - _fail sets it
            raise self._closed from None
        self._calls.append(call)
        return call

    def _look(self, oldest: int) -> None:
        """Fail when the call that was the oldest one a time limit ago still waits: one timer, not one for each take."""
        if self._calls and self._calls[0].sequence <= oldest:
            self._fail(f"no answer to a take in {self._timeout:g} s")
        else:
            self._watch = self._loop.call_later(self._timeout, self._look, self._sequence)

    def _read(self) -> None:
        try:
            packet = self._sock.recv(REPLY.size + MAX_ERROR_TEXT + 1)  # one: what else has come brings us here again
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(f"the take socket broke: {error.strerror}")
            return
        if not packet:
            self._fail("the host closed the take socket: it or its guest has gone")
        elif not self._answered(packet):
            self._fail("the host broke the take protocol")

    def _answered(self, packet: bytes) -> bool:
        if len(packet) < REPLY.size or not self._calls:
            return False
        sequence, status, possible, _ = REPLY.unpack_from(packet)
        call = self._calls.popleft()
        if sequence != call.sequence:
            self._calls.appendleft(call)
            return False
        if status == Status.OK:
            taken = self._bitmaps.taken.get(call.region, _NONE)[call.first : call.first + call.words]
            call.done.set_result((taken, possible))
        else:
            code = _CODES.get(status, "error") if status in Status else "error"
            text = packet[REPLY.size :].decode(errors="replace")
            call.done.set_exception(ControlError(text or "the host could not do that", code=code))
        return True

    def _fail(self, message: str) -> None:
        if self._closed is None:
            self._closed = ControlError(message, code="closed")
            self._watch.cancel()
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
        for call in self._calls:
            if not call.done.done():
                call.done.set_exception(self._closed)
        self._calls.clear()

    def close(self) -> None:
        """Close the socket; calls under way end with an error."""
        self._fail("this user has left the dirty log")
