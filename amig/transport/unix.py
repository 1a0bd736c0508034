"""Unix sockets: connecting and listening, for this user only."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import struct
from typing import Any, Final

from amig.errors import HostError, LinkLost
from amig.transport.address import UnixAddress
from amig.transport.listener import SocketListener
from amig.transport.sock import SocketConnection

BACKLOG: Final = 128
BUFFER_BYTES: Final = 4 << 20
"""Asked for in each direction; the kernel gives up to wmem_max. Unix sockets don't tune themselves."""
_UCRED: Final = struct.Struct("=iII")


async def connect(address: UnixAddress, *, timeout: float) -> SocketConnection:
    """Connect; raises `LinkLost` within ``timeout`` seconds."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _tune(sock)
        async with asyncio.timeout(timeout):
            await _connect(sock, address.path)
        return SocketConnection(sock, f"{address}{_pid(sock)}")
    except TimeoutError:
        sock.close()
        raise LinkLost(f"{address} did not answer within {timeout:g} s: its owner is busy or stopped") from None
    except OSError as err:
        sock.close()
        if err.errno in (errno.ECONNREFUSED, errno.ENOENT):
            raise LinkLost(f"nobody listens at {address}: start `amig receive {address}` there") from err
        raise LinkLost(f"can't connect to {address}: {os.strerror(err.errno or 0)}") from err
    except BaseException:
        sock.close()
        raise


async def listen(address: UnixAddress) -> SocketListener[SocketConnection]:
    """Listen on a socket with mode 0600; one that was left behind by a dead process is replaced.

    Raises `HostError` when somebody listens there, or when what lies there is not a socket.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The mode is taken over from the descriptor when the kernel makes the file: no moment in which others can
        # connect, and no change of the process's umask.
        os.fchmod(sock.fileno(), 0o600)
        try:
            sock.bind(address.path)
        except OSError as err:
            if err.errno != errno.EADDRINUSE:
                raise
            _remove_stale(address)
            sock.bind(address.path)
        sock.listen(BACKLOG)
        made = os.lstat(address.path)
    except OSError as err:
        sock.close()
        raise HostError(f"can't listen on {address}: {os.strerror(err.errno or 0)}") from err
    except BaseException:
        sock.close()
        raise
    return SocketListener(sock, str(address), _accepted, on_close=lambda: _unlink(address.path, made))


async def _connect(sock: socket.socket, path: str) -> None:
    # A full backlog says EAGAIN at once on a unix socket, and there is nothing to wait on but time.
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(0.02)
        else:
            return


def _remove_stale(address: UnixAddress) -> None:
    found = os.lstat(address.path)
    if not stat.S_ISSOCK(found.st_mode):
        raise HostError(f"{address.path} exists and is not a socket: choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        problem = probe.connect_ex(address.path)
    if problem != errno.ECONNREFUSED:
        raise HostError(f"somebody listens at {address} already: choose another path, or stop it")
    _unlink(address.path, found)


def _unlink(path: str, made: os.stat_result) -> None:
    """Remove the socket unless another has taken its place."""
    try:
        now = os.lstat(path)
        if (now.st_dev, now.st_ino) == (made.st_dev, made.st_ino):
            os.unlink(path)
    except OSError:
        pass  # gone already, or its folder is: nothing of ours is left


def _accepted(sock: socket.socket, name: Any) -> SocketConnection:
    _tune(sock)
    return SocketConnection(sock, f"unix:{name or 'peer'}{_pid(sock)}")


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)


def _pid(sock: socket.socket) -> str:
    pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return f" (pid {pid})" if pid > 0 else ""
