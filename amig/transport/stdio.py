"""The far side of ssh: one connection, on standard input and output.

Both are taken over: what a library prints by mistake goes to standard error, not into the stream. sshd gives a command
one socket for both, which is used as such; anything else (pipes) works, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, cast

from amig.errors import HostError, UsageError
from amig.transport.sock import SocketConnection

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC: Final = b"amig stdio 1\n"
"""Said before anything else, so that the other side sees that amig answers, and not a login script."""
DESCRIPTORS: Final = "AMIG_STDIO"
"""Environment variable in which a detached host finds the two descriptors, as ``IN:OUT``."""


def take_over() -> tuple[int, int]:
    """Return this process's standard input and output as descriptors of our own, which a child does not inherit.

    Input becomes empty, and output goes to standard error. Raises `UsageError` at a terminal.
    """
    if os.isatty(0) or os.isatty(1):
        raise UsageError("--stdio is for `amig migrate NAME ssh://HOST/NAME`, which runs it on the far side of ssh")
    ours = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return ours


def inherited() -> tuple[int, int] | None:
    """Return the descriptors that the process which detached us has left to us; None when there are none."""
    words = os.environ.pop(DESCRIPTORS, "").split(":")
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return None
    for word in words:
        os.set_inheritable(int(word), False)
    return int(words[0]), int(words[1])


def connection(reader: int, writer: int) -> SocketConnection:
    """Return a connection over two descriptors, which it owns from here."""
    kinds = [os.fstat(fd).st_mode for fd in (reader, writer)]
    if all(map(stat.S_ISSOCK, kinds)) and os.path.sameopenfile(reader, writer):
        os.close(writer)
        return SocketConnection(socket.socket(fileno=reader), _peer())
    if not all(stat.S_ISSOCK(kind) or stat.S_ISFIFO(kind) for kind in kinds):
        os.close(reader)
        os.close(writer)
        raise UsageError("--stdio needs pipes or a socket as standard input and output, as ssh gives them")
    return PipeConnection(reader, writer, _peer())


def _peer() -> str:
    source = os.environ.get("SSH_CONNECTION", "").split(" ")[0]
    return f"ssh from {source}" if source else "standard input"


class PipeConnection(SocketConnection):
    """`Connection` over two descriptors, one for each way."""

    _threaded = False  # a pipe ends when its last descriptor is closed

    def __init__(self, reader: int, writer: int, peer: str) -> None:
        super().__init__(cast(socket.socket, _Pipes(reader, writer)), peer)
        self._out_fd = writer


class _Pipes:
    """What `SocketConnection` asks of a socket, of two pipes."""

    family = None

    def __init__(self, reader: int, writer: int) -> None:
        self._reader = reader
        self._writer = writer

    def setblocking(self, blocking: bool) -> None:
        os.set_blocking(self._reader, blocking)
        os.set_blocking(self._writer, blocking)

    def fileno(self) -> int:
        return self._reader

    def sendmsg(self, buffers: Iterable[Buffer]) -> int:
        return os.writev(self._writer, list(buffers))

    def recv_into(self, view: Buffer) -> int:
        return os.readv(self._reader, [view])

    def recvmsg_into(self, views: Iterable[Buffer]) -> tuple[int, None, None, None]:
        return os.readv(self._reader, list(views)), None, None, None

    def shutdown(self, _: int) -> None:
        # The number stays taken until `close`: the event loop may still know it.
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, self._writer, inheritable=False)
        os.close(null)

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


class StdioListener:
    """`Listener` that has one connection to give, and then none."""

    def __init__(self, reader: int, writer: int) -> None:
        self._connection: SocketConnection | None = connection(reader, writer)
        self._closed = asyncio.get_running_loop().create_future()

    @property
    def address(self) -> str:
        """For people."""
        return "standard input"

    async def accept(self) -> SocketConnection:
        """Return the connection; the next call waits until the listener is closed, and raises `HostError`."""
        if self._connection is None:
            await asyncio.shield(self._closed)
            raise HostError("nobody else can come on standard input")
        await self._connection.send(MAGIC)
        given, self._connection = self._connection, None
        return given

    async def close(self) -> None:
        """Drop the connection if nobody asked for it. Idempotent."""
        if self._connection is not None:
            self._connection.abort()
        with contextlib.suppress(asyncio.InvalidStateError):
            self._closed.set_result(None)
