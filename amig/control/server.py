"""The host's end of the control socket: accepts, checks who it is, cuts frames, answers in order, tidies up.

What requests mean is the `Session`'s business (`amig.host.session`); this file knows frames, limits and lifetimes.
Each connection has one task that reads a request, has it answered, and only then reads the next: a client may send
ahead as much as the socket's buffer takes, and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Protocol

from amig.control import messages as m
from amig.control import replies as rp
from amig.control import types
from amig.control.fdpass import Closed, FrameReader, FrameWriter, close_all
from amig.control.link import check_socket_path
from amig.control.waiting import readable
from amig.errors import AmigError, ControlError, HostError

MAX_CONNECTIONS = 64
LINGER = 1.0
"""Seconds that a client has to take the last words said to it."""
_log = logging.getLogger(__name__)
_UCRED = struct.Struct("iII")


class Answer:
    """A reply and the descriptors that go with it, which are closed once it has been posted."""

    def __init__(self, reply: types.Reply, fds: tuple[int, ...] = ()) -> None:
        self.reply = reply
        self.fds = list(fds)


class Session(Protocol):
    """What one connection is to its host."""

    async def answer(self, request: m.AnyRequest) -> Answer:
        """Do what is asked. An `AmigError` is sent as the reply."""

    async def end(self) -> None:
        """Undo what has to be undone; called once, when the connection has gone."""


class Outbox(Protocol):
    """What a session may do to its connection on its own account."""

    @property
    def buffered(self) -> int:
        """Bytes that the client has not taken yet."""

    def notify(self, notice: types.Notice) -> None:
        """Queue a notice; dropped when the connection has gone."""


OpenSession = Callable[[Outbox], Session]
ErrorCode = Callable[[AmigError], str]


class _Connection:
    """One client."""

    def __init__(self, sock: socket.socket, open_session: OpenSession, error_code: ErrorCode) -> None:
        self._sock = sock
        self._reader = FrameReader(sock, limit=types.MAX_FRAME, max_fds=0)
        self._writer = FrameWriter(sock)
        self._session = open_session(self)
        self._error_code = error_code

    @property
    def buffered(self) -> int:
        return self._writer.buffered

    def notify(self, notice: types.Notice) -> None:
        with contextlib.suppress(Closed):
            self._writer.post(m.encode(notice))

    async def serve(self) -> None:
        """Answer until the client goes or breaks the protocol; then undo what it did."""
        try:
            while True:
                frame, _ = await self._reader.receive()
                await self._answer(m.decode_request(frame))
                await self._writer.drained()
                await asyncio.sleep(0)  # a client that asks without end does not get the loop for itself
        except Closed:
            pass
        except ControlError as error:
            _log.warning("a control connection is dropped: %s", error)
            await self._last_words(error)
        finally:
            # the socket is closed last: a client that waits for its end knows that all is undone
            try:
                await self._session.end()
                with contextlib.suppress(Closed, TimeoutError):
                    async with asyncio.timeout(LINGER):
                        await self._writer.flushed()
            finally:
                self._writer.close()
                self._reader.close()
                self._sock.close()

    async def _answer(self, request: m.AnyRequest) -> None:
        try:
            answer = await self._session.answer(request)
        except AmigError as error:
            answer = Answer(rp.Error(id=request.id, code=self._error_code(error), message=str(error)[:4096]))
        except OSError as error:
            _log.exception("a control request failed")
            answer = Answer(rp.Error(id=request.id, code="error", message=str(error)[:4096]))
        try:
            if request.id:
                self._writer.post(m.encode(answer.reply), tuple(answer.fds))
        finally:
            close_all(answer.fds)

    async def _last_words(self, error: ControlError) -> None:
        with contextlib.suppress(Closed, TimeoutError):
            self._writer.post(m.encode(rp.Error(code=error.code, message=str(error)[:4096])))
            async with asyncio.timeout(LINGER):
                await self._writer.flushed()


class ControlServer:
    """Listens on a unix socket of mode 0600 and serves until cancelled."""

    def __init__(self, path: str | os.PathLike[str], open_session: OpenSession, error_code: ErrorCode) -> None:
        """Bind and listen at once, so that clients can connect before `serve` runs. Raises `HostError`."""
        self.path = check_socket_path(path)
        self._open_session = open_session
        self._error_code = error_code
        self.connections = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._sock.bind(self.path)
            # nobody can connect before listen, so the mode is right in time
            os.chmod(self.path, 0o600)
            self._sock.listen(MAX_CONNECTIONS)
        except OSError as error:
            self._sock.close()
            raise HostError(f"can't listen at {self.path}: {error.strerror}") from error

    async def serve(self) -> None:
        """Serve until cancelled; every connection's work is undone before this returns."""
        async with asyncio.TaskGroup() as connections:
            while True:
                try:
                    client, _ = self._sock.accept()
                except BlockingIOError:
                    await readable(self._sock.fileno())
                    continue
                except OSError as error:  # out of descriptors: what is open goes on, the rest has to wait
                    _log.warning("can't accept a control connection: %s", error)
                    await asyncio.sleep(0.1)
                    continue
                client.setblocking(False)
                if self._welcome(client):
                    connections.create_task(self._serve(client))
                else:
                    client.close()

    def _welcome(self, client: socket.socket) -> bool:
        if self.connections >= MAX_CONNECTIONS:
            _log.warning("a control connection is refused: there are %d already", self.connections)
            return False
        pid, uid, _ = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid not in (0, os.geteuid()):
            _log.warning("a control connection from process %d of user %d is refused", pid, uid)
            return False
        return True

    async def _serve(self, client: socket.socket) -> None:
        self.connections += 1
        try:
            await _Connection(client, self._open_session, self._error_code).serve()
        except Exception:  # one connection's bug must not end the guest
            _log.exception("a control connection failed")
        finally:
            self.connections -= 1

    def close(self) -> None:
        """Stop listening; idempotent. The socket's file is whoever's who holds the name."""
        self._sock.close()
