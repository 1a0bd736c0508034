"""A client's connection to a host: requests out, replies matched by id, notices to a callback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import TypeVar

import msgspec

from amig.aio import finish
from amig.control import messages as m
from amig.control import replies as rp
from amig.control import requests as rq
from amig.control import types
from amig.control.fdpass import Closed, FrameReader, FrameWriter, close_all
from amig.errors import ControlError, NoSuchGuest, UsageError

R = TypeVar("R", bound=types.Reply)

MAX_FDS = 64
DEFAULT_TIMEOUT = 60.0
MAX_SOCKET_PATH = 107
"""Bytes; sockaddr_un has 108 with the zero at the end."""


def check_socket_path(path: str | os.PathLike[str]) -> str:
    """Return the path as a string; raises `UsageError` when the kernel can't take one so long."""
    text = os.fspath(path)
    if len(os.fsencode(text)) > MAX_SOCKET_PATH:
        raise UsageError(
            f"the socket path {text} has {len(os.fsencode(text))} bytes, and the system takes at most "
            f"{MAX_SOCKET_PATH}: use a shorter guest name, or set XDG_RUNTIME_DIR to a shorter directory"
        )
    return text


class _Pending:
    __slots__ = ("fds", "limit", "reply")

    def __init__(self, limit: int) -> None:
        self.reply: asyncio.Future[types.Reply] = asyncio.get_running_loop().create_future()
        self.limit = limit
        self.fds: list[int] = []


class Link:
    """One connection. Bound to the event loop that made it; needs no task of its own."""

    def __init__(self, sock: socket.socket, *, timeout: float) -> None:
        self._sock = sock
        self._timeout = timeout
        self._reader = FrameReader(sock, limit=types.MAX_FRAME, max_fds=MAX_FDS)
        self._writer = FrameWriter(sock)
        self._pending: dict[int, _Pending] = {}
        self._next = 1
        self._broken: ControlError | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)
        self._reading = True
        self._farewell = ""
        self.on_notice: Callable[[types.Notice], None] | None = None
        self.on_broken: Callable[[ControlError], None] | None = None

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], *, timeout: float = DEFAULT_TIMEOUT) -> Link:
        """Connect to a host's socket; raises `NoSuchGuest` when nobody listens there."""
        text = check_socket_path(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            try:
                async with asyncio.timeout(timeout):
                    while True:
                        try:
                            sock.connect(text)
                        except BlockingIOError:  # the host's backlog is full
                            await asyncio.sleep(0.01)
                        else:
                            break
            except TimeoutError:
                raise ControlError(f"the host at {text} does not accept connections", code="timeout") from None
            except (FileNotFoundError, ConnectionRefusedError):
                raise NoSuchGuest(f"no guest host listens at {text}") from None
            except OSError as error:
                raise ControlError(f"can't connect to the host at {text}: {error.strerror}", code="closed") from None
            return cls(sock, timeout=timeout)
        except BaseException:
            sock.close()
            raise

    async def hello(self, *, client: str, want_memory: bool = False) -> tuple[rp.HelloOk, list[int]]:
        """Say who we are; returns the host's answer and its descriptors, the caller's to close."""
        hello = rq.Hello(
            version=types.VERSION,
            require=("take-socket", "take-sync") if want_memory else (),
            want_memory=want_memory,
            client=client[:256],
        )
        return await self.request(hello, rp.HelloOk, limit=types.MAX_HELLO_FRAME)

    async def ask(self, request: types.Request) -> None:
        """Send a request whose answer is only yes or no."""
        _, fds = await self.request(request, rp.Ok)
        close_all(fds)

    async def request(
        self, request: types.Request, kind: type[R], *, limit: int = types.MAX_FRAME
    ) -> tuple[R, list[int]]:
        """Send a request and wait for its reply; raises `ControlError` as the host words it.

        When cancelled it still waits for the reply, for at most the link's time limit: what the host does can't be
        called back. No reply in time breaks the link, which makes the host undo what this connection did.
        """
        if self._broken is not None:
            raise self._broken
        number = self._next
        self._next = self._next % (2**32 - 1) + 1
        pending = self._pending[number] = _Pending(limit)
        self._reader.limit = max(self._reader.limit, limit)
        late = self._loop.call_later(self._timeout, self._time_out, type(request).__name__)
        try:
            self._writer.post(m.encode(msgspec.structs.replace(request, id=number)))
            reply = await finish(pending.reply)
        except BaseException:
            close_all(pending.fds)
            raise
        finally:
            late.cancel()
            self._pending.pop(number, None)
            self._reader.limit = max([types.MAX_FRAME, *(p.limit for p in self._pending.values())])
        if isinstance(reply, kind):
            return reply, pending.fds
        close_all(pending.fds)
        if isinstance(reply, rp.Error):
            raise ControlError(reply.message, code=reply.code)
        asked, answered = type(request).__name__, type(reply).__name__
        error = ControlError(f"the host answered {asked} with {answered}", code="malformed")
        self.abort(error)
        raise error

    def post(self, request: types.Request) -> None:
        """Send a request and forget it: whatever the answer is, it changes nothing for us."""
        if self._broken is None:
            with contextlib.suppress(Closed):
                self._writer.post(m.encode(request))  # id 0 is nobody's

    async def drained(self) -> None:
        """Wait until the host has read most of what was sent."""
        await self._writer.drained()

    @property
    def buffered(self) -> int:
        """Bytes that the host has not taken yet."""
        return self._writer.buffered

    def pause_reading(self) -> None:
        """Take nothing more from the host for now."""
        if self._reading and self._broken is None:
            self._loop.remove_reader(self._sock.fileno())
            self._reading = False

    def resume_reading(self) -> None:
        """Go on reading."""
        if not self._reading and self._broken is None:
            self._loop.add_reader(self._sock.fileno(), self._readable)
            self._reading = True

    def _readable(self) -> None:
        try:
            while self._broken is None and self._reading and (frame := self._reader.pump()) is not None:
                payload, fds = frame
                try:
                    self._dispatch(m.decode_from_host(payload), fds)
                finally:
                    close_all(fds)
        except Closed as error:
            self.abort(ControlError(f"{error}: the host has gone{self._farewell}", code="closed"))
        except ControlError as error:
            self.abort(error)

    def _dispatch(self, message: m.AnyFromHost, fds: list[int]) -> None:
        if isinstance(message, rp.GuestEnded):
            self._farewell = f"; its guest ended: {message.reason or message.state}"
        if isinstance(message, types.Notice):
            if self.on_notice is not None:
                self.on_notice(message)
            return
        if message.id == 0:
            return
        pending = self._pending.get(message.id)
        if pending is None or pending.reply.done():
            raise ControlError("the host answered what nobody asked", code="malformed")
        pending.fds.extend(fds)
        fds.clear()
        pending.reply.set_result(message)

    def _time_out(self, what: str) -> None:
        self.abort(ControlError(f"no answer to {what} from the host in {self._timeout:g} s", code="timeout"))

    def abort(self, error: ControlError) -> None:
        """Break the connection; everything that waits for it raises ``error``. Idempotent."""
        if self._broken is not None:
            return
        self._broken = error
        if self._reading:
            self._loop.remove_reader(self._sock.fileno())
        self._writer.close(Closed(str(error)))
        self._reader.close()
        self._sock.close()
        for pending in self._pending.values():
            if not pending.reply.done():
                pending.reply.set_exception(error)
        if self.on_broken is not None:
            self.on_broken(error)

    @property
    def broken(self) -> ControlError | None:
        """Why nothing can be asked any more, or None."""
        return self._broken

    def close(self) -> None:
        """Hang up. Idempotent."""
        self.abort(ControlError("this connection was closed", code="closed"))
