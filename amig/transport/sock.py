"""One stream socket, without asyncio's transports: the kernel copies from and to the caller's own memory.

asyncio's transports copy what the kernel did not take at once, and uvloop's keep references to it; both must not happen
to buffers that are guest memory or go back to a pool. So the socket is non-blocking and tried first; only when the
kernel has no room (or nothing) does the task wait for the descriptor with ``add_writer`` (``add_reader``). Many pages
at once are moved by a thread (`amig.transport.mover`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

from amig.errors import LinkLost
from amig.pieces import Pieces
from amig.transport.base import PageMover
from amig.transport.mover import WORTH_BYTES, Mover
from amig.transport.vectors import IOV_MAX, Transfer

if TYPE_CHECKING:
    from typing_extensions import Buffer

YIELD_BYTES: Final = 2 << 20
"""Bytes moved without waiting after which other tasks get a turn."""
YIELD_CALLS: Final = 64
LINGER: Final = 1.0
"""Seconds that `SocketConnection.close` waits for the peer to end the stream, too."""
_TCPI_BYTES_ACKED: Final = 120  # offset in struct tcp_info, linux/tcp.h


class SocketConnection:
    """`Connection` over a connected, non-blocking stream socket, which it owns."""

    _threaded = True
    """Whether a second descriptor for a thread does no harm: the end of what is sent must not depend on it."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = self._out_fd = sock.fileno()
        self._tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._sent = 0
        self._received = 0
        # Each way breaks on its own: a peer that closed may have said why, and that waits to be read.
        self._send_broken = ""
        self._recv_broken = ""
        self._sending = False
        self._receiving = False
        self._waiting: set[asyncio.Future[None]] = set()
        self._movers: dict[int, Mover] = {}
        self._budget = YIELD_BYTES
        self._calls = YIELD_CALLS

    @property
    def pages(self) -> PageMover | None:
        """The connection itself."""
        return self

    @property
    def peer(self) -> str:
        """Who is at the other end, for people."""
        return self._peer

    @property
    def identity(self) -> bytes:
        """Empty: nothing is proved here."""
        return b""

    @property
    def bytes_sent(self) -> int:
        """Bytes that the kernel has taken from us."""
        return self._sent

    @property
    def bytes_received(self) -> int:
        """Bytes that have come."""
        return self._received

    async def send(self, *buffers: Buffer) -> None:
        """Send all buffers, gathered in order; see `Connection.send`."""
        with self._turn_to_send():
            for at in range(0, len(buffers), IOV_MAX):
                await self._send_some(list(buffers[at : at + IOV_MAX]))

    async def send_pieces(self, head: bytes, pieces: Pieces) -> None:
        """Send ``head`` and then pages from where they lie; see `Connection.send_pieces`."""
        with self._turn_to_send():
            await self._send_vectors(Transfer(pieces.vectors, head))

    async def recv_into(self, *views: Buffer) -> None:
        """Fill all views, in order and to the last byte; see `Connection.recv_into`."""
        with self._turn_to_receive():
            if len(views) == 1:
                await self._fill(_flat(views[0]))
            else:
                for at in range(0, len(views), IOV_MAX):
                    await self._scatter([_flat(v) for v in views[at : at + IOV_MAX]])

    async def recv_pieces(self, pieces: Pieces) -> None:
        """Fill pages where they lie, to the last byte; see `Connection.recv_pieces`."""
        with self._turn_to_receive():
            await self._recv_vectors(Transfer(pieces.vectors))

    def outstanding(self) -> int | None:
        """Bytes sent that the peer's kernel has not acknowledged (TCP_INFO); None for a unix socket."""
        if not self._tcp or self._fd < 0:
            return None
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        if len(info) < 128:
            return None
        (acked,) = struct.unpack_from("<Q", info, _TCPI_BYTES_ACKED)
        return max(0, self._sent - int(acked))

    async def close(self) -> None:
        """End the stream after everything sent and wait up to `LINGER` seconds for the peer to end it, too.

        Closing with unread data would make the kernel send a reset, which throws away what the peer has not read yet:
        our last message, which says why. So what still comes is read and dropped. Cancelled, it aborts.
        """
        if not self._send_broken:
            try:
                self._sock.shutdown(socket.SHUT_WR)
                async with asyncio.timeout(LINGER):
                    await self._drain()
            except (OSError, TimeoutError, LinkLost):
                pass
            finally:
                self.abort()
        self.abort()

    def abort(self) -> None:
        """Drop the connection at once; whoever waits on it gets `LinkLost`."""
        if self._fd < 0:
            return
        closed = "it was closed on this side"
        self._send_broken = self._send_broken or closed
        self._recv_broken = self._recv_broken or closed
        self._forget(self._fd, self._loop.remove_reader)
        self._forget(self._out_fd, self._loop.remove_writer)
        self._fd = self._out_fd = -1
        for mover in self._movers.values():
            mover.stop()
        self._sock.close()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(self._gone(closed))

    @contextlib.contextmanager
    def _turn_to_send(self) -> Iterator[None]:
        if self._sending:
            raise RuntimeError("two tasks send on one connection at the same time")
        self._usable(self._send_broken)
        self._sending = True
        before = self._sent
        try:
            yield
        except BaseException:
            if self._sent != before:
                self._send_broken = self._send_broken or "a message to it was cut off"
            raise
        finally:
            self._sending = False

    @contextlib.contextmanager
    def _turn_to_receive(self) -> Iterator[None]:
        if self._receiving:
            raise RuntimeError("two tasks receive on one connection at the same time")
        self._usable(self._recv_broken)
        self._receiving = True
        before = self._received
        try:
            yield
        except BaseException:
            if self._received != before:
                self._recv_broken = self._recv_broken or "a message from it was cut off"
            raise
        finally:
            self._receiving = False

    async def _send_vectors(self, transfer: Transfer) -> None:
        def write(fd: int) -> bool:
            self._sent += transfer.write(fd)
            return transfer.left > 0

        try:
            await self._move(transfer.size, select.POLLOUT, write, self._writable)
        except OSError as err:
            self._send_broken = self._send_broken or _why(err)
            raise self._gone(self._send_broken) from err
        if transfer.left:
            raise self._gone(self._send_broken)

    async def _recv_vectors(self, transfer: Transfer) -> None:
        def read(fd: int) -> bool:
            came = transfer.read(fd)
            self._received += came
            return came > 0 and transfer.left > 0

        try:
            await self._move(transfer.size, select.POLLIN, read, self._readable)
        except OSError as err:
            self._recv_broken = self._recv_broken or _why(err)
            raise self._gone(self._recv_broken) from err
        if transfer.left:
            if self._fd < 0:
                raise self._gone(self._recv_broken)
            raise self._ended(transfer.size - transfer.left, transfer.size)

    async def _move(
        self, size: int, event: int, step: Callable[[int], bool], ready: Callable[[], Awaitable[None]]
    ) -> None:
        """Call ``step`` until it returns False, or the connection is aborted: in a thread where that is worth it."""
        if size >= WORTH_BYTES and self._threaded:
            mover = self._movers.get(event) or Mover(self._fd, event)
            self._movers[event] = mover
            try:
                await mover.run(step)
            except asyncio.CancelledError:
                self._movers.pop(event, None)  # it has stopped; where nothing was moved yet, another may begin
                raise
            return
        while True:
            try:
                # Looked up each time: `abort` may have come between, and the number may be somebody else's by now.
                if not step(self._out_fd if event == select.POLLOUT else self._fd):
                    break
            except BlockingIOError:
                await ready()
        await self._breathe(size)

    async def _send_some(self, buffers: list[Buffer]) -> None:
        left = sum([memoryview(b).nbytes for b in buffers])
        while True:
            try:
                took = self._sock.sendmsg(buffers)
            except BlockingIOError:
                await self._writable()
                continue
            except OSError as err:
                self._send_broken = self._send_broken or _why(err)
                raise self._gone(self._send_broken) from err
            self._sent += took
            left -= took
            if not left:
                await self._breathe(took)
                return
            buffers = _after(buffers, took)
            await self._writable()

    async def _fill(self, view: memoryview) -> None:
        size = len(view)
        done = 0
        while done < size:
            try:
                came = self._sock.recv_into(view[done:])
            except BlockingIOError:
                await self._readable()
                continue
            except OSError as err:
                self._recv_broken = self._recv_broken or _why(err)
                raise self._gone(self._recv_broken) from err
            if not came:
                raise self._ended(done, size)
            self._received += came
            done += came
        await self._breathe(size)

    async def _scatter(self, views: list[memoryview]) -> None:
        size = sum([len(v) for v in views])
        rest: list[Buffer] = [v for v in views if len(v)]
        done = 0
        while done < size:
            try:
                came, _, _, _ = self._sock.recvmsg_into(rest)
            except BlockingIOError:
                await self._readable()
                continue
            except OSError as err:
                self._recv_broken = self._recv_broken or _why(err)
                raise self._gone(self._recv_broken) from err
            if not came:
                raise self._ended(done, size)
            self._received += came
            done += came
            if done < size:
                rest = _after(rest, came)
        await self._breathe(size)

    async def _drain(self) -> None:
        waste = bytearray(1 << 16)
        while True:
            try:
                if not self._sock.recv_into(waste):
                    return
            except BlockingIOError:
                await self._readable()
            else:
                await self._breathe(len(waste))

    async def _breathe(self, moved: int) -> None:
        # A peer that is as fast as we are would keep this task going for ever: nothing else here ever has to wait.
        self._budget -= moved
        self._calls -= 1
        if self._budget <= 0 or self._calls <= 0:
            self._budget = YIELD_BYTES
            self._calls = YIELD_CALLS
            await asyncio.sleep(0)

    async def _writable(self) -> None:
        await self._wait(self._out_fd, self._loop.add_writer, self._loop.remove_writer)

    async def _readable(self) -> None:
        await self._wait(self._fd, self._loop.add_reader, self._loop.remove_reader)

    async def _wait(self, fd: int, add: Callable[..., object], remove: Callable[[int], object]) -> None:
        if self._fd < 0:
            raise self._gone(self._recv_broken)
        waiter = self._loop.create_future()
        self._waiting.add(waiter)
        add(fd, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)
            self._forget(fd, remove)
        self._budget = YIELD_BYTES
        self._calls = YIELD_CALLS

    def _forget(self, fd: int, remove: Callable[[int], object]) -> None:
        if self._fd >= 0:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is watched any more
                remove(fd)

    def _usable(self, broken: str) -> None:
        if broken:
            raise self._gone(broken)

    def _ended(self, done: int, size: int) -> LinkLost:
        self._recv_broken = self._recv_broken or "the peer ended it"
        return LinkLost(f"{self._peer} ended the connection: {done} of {size} bytes came")

    def _gone(self, why: str) -> LinkLost:
        return LinkLost(f"the connection to {self._peer} is lost: {why}")


def _why(err: OSError) -> str:
    return os.strerror(err.errno) if err.errno else str(err)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _flat(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _after(buffers: list[Buffer], took: int) -> list[Buffer]:
    """Return what is left of ``buffers`` once their first ``took`` bytes are gone."""
    for at, buffer in enumerate(buffers):
        size = memoryview(buffer).nbytes
        if took < size:
            return [_flat(buffer)[took:], *buffers[at + 1 :]]
        took -= size
    return []
