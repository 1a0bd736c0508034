"""Frames with descriptors over a non-blocking unix stream socket.

A frame's descriptors travel with its first byte. A reader never reads past the frame it is in, so that descriptors
always belong to the frame at hand (unix(7): ancillary data is a barrier in a stream); it takes at most as many as it
has said, and closes every one that it did not expect. The kernel itself closes what finds no room.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections import deque

from amig.control.waiting import readable
from amig.errors import ControlError

HEADER = struct.Struct("<I")
_FD = struct.calcsize("i")
_RECV_FLAGS = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
_SEND_FLAGS = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT


class Closed(ControlError):
    """The other end has gone; ``clean`` when it went between two frames."""

    def __init__(self, message: str = "the control connection was closed", *, clean: bool = True) -> None:
        super().__init__(message, code="closed")
        self.clean = clean


def close_all(fds: list[int]) -> None:
    """Close descriptors, all of them, whatever happens."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    fds.clear()


class FrameReader:
    """Cuts frames out of a socket. ``limit`` and ``max_fds`` may change between frames."""

    def __init__(self, sock: socket.socket, *, limit: int, max_fds: int = 0) -> None:
        self._sock = sock
        self.limit = limit
        self.max_fds = max_fds
        self._fds: list[int] = []
        self._start()

    def _start(self) -> None:
        self._buffer = bytearray(HEADER.size)
        self._filled = 0
        self._in_header = True

    def pump(self) -> tuple[bytearray, list[int]] | None:
        """Return the next whole frame and its descriptors (now the caller's), or None when it has not come yet.

        Raises `Closed` at the end of the stream and `ControlError` (``too-large``, ``descriptors``) for a frame that
        is not allowed; the connection can't be used any more then.
        """
        while True:
            if self._filled < len(self._buffer):
                if not self._fill():
                    return None
            elif self._in_header:
                (length,) = HEADER.unpack(self._buffer)
                if length > self.limit:
                    raise ControlError(f"a frame of {length} bytes, where {self.limit} are allowed", code="too-large")
                self._buffer, self._filled, self._in_header = bytearray(length), 0, False
            else:
                frame, fds = self._buffer, self._fds
                self._fds = []
                self._start()
                return frame, fds

    def _fill(self) -> bool:
        room = memoryview(self._buffer)[self._filled :]
        space = socket.CMSG_SPACE(self.max_fds * _FD) if self.max_fds else 0
        try:
            count, ancillary, flags, _ = self._sock.recvmsg_into([room], space, _RECV_FLAGS)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise Closed(f"the control connection broke: {error.strerror}", clean=False) from None
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(data) - len(data) % _FD
                self._fds.extend(struct.unpack(f"{whole // _FD}i", data[:whole]))
        if flags & socket.MSG_CTRUNC or len(self._fds) > self.max_fds:
            # CMSG_SPACE is rounded up, so one more than asked for may fit
            close_all(self._fds)
            raise ControlError(f"more than {self.max_fds} descriptors with one message", code="descriptors")
        if count == 0:
            raise Closed(clean=self._in_header and self._filled == 0)
        self._filled += count
        return True

    async def receive(self) -> tuple[bytearray, list[int]]:
        """Wait for the next frame. Cancelling loses nothing: what has come is kept for the next call."""
        while (frame := self.pump()) is None:
            await readable(self._sock.fileno())
        return frame

    def close(self) -> None:
        """Close descriptors that nobody took."""
        close_all(self._fds)


class FrameWriter:
    """Sends frames in order, from memory bounded by ``limit``: whoever posts much waits in `drained`.

    A frame once posted is sent whole or the connection is broken, so a cancelled caller never leaves half a frame.
    """

    def __init__(self, sock: socket.socket, *, limit: int = 256 << 10) -> None:
        self._sock = sock
        self._limit = limit
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._watching = False
        self._broken: Closed | None = None
        self.buffered = 0

    def post(self, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        """Queue one frame; descriptors are duplicated, the caller keeps its own. Raises `Closed`."""
        if self._broken is not None:
            raise self._broken
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))  # noqa: PERF401 - those made before a failure have to be closed
        except OSError:
            close_all(copies)
            raise
        self._queue.append((memoryview(HEADER.pack(len(payload)) + payload), copies))
        self.buffered += HEADER.size + len(payload)
        if not self._watching:
            self._write()

    def _write(self) -> None:
        try:
            while self._queue:
                data, fds = self._queue[0]
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
                sent = self._sock.sendmsg([data], rights, _SEND_FLAGS)
                close_all(fds)
                self.buffered -= sent
                if sent < len(data):
                    self._queue[0] = (data[sent:], fds)
                else:
                    self._queue.popleft()
        except (BlockingIOError, InterruptedError):
            if not self._watching:
                asyncio.get_running_loop().add_writer(self._sock.fileno(), self._write)
                self._watching = True
        except OSError as error:
            self.close(Closed(f"the control connection broke: {error.strerror}", clean=False))
        else:
            self._unwatch()
        self._wake()

    def _unwatch(self) -> None:
        if self._watching:
            asyncio.get_running_loop().remove_writer(self._sock.fileno())
            self._watching = False

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def drained(self) -> None:
        """Wait until no more than ``limit`` bytes are queued. Raises `Closed`."""
        await self._below(self._limit)

    async def flushed(self) -> None:
        """Wait until everything posted is in the kernel's hands. Raises `Closed`."""
        await self._below(0)

    async def _below(self, limit: int) -> None:
        while self._broken is None and self.buffered > limit:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        if self._broken is not None:
            raise self._broken

    def close(self, why: Closed | None = None) -> None:
        """Send nothing more; idempotent. The socket is the caller's to close, after this."""
        if self._broken is None:
            self._broken = why or Closed()
        self._unwatch()
        for _, fds in self._queue:
            close_all(fds)
        self._queue.clear()
        self.buffered = 0
        self._wake()
