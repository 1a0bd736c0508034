"""TCP: connecting and listening."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import Any, Final, TypeVar

from amig.errors import HostError, LinkLost
from amig.transport.address import TcpAddress, TlsAddress
from amig.transport.listener import SocketListener
from amig.transport.sock import SocketConnection

BACKLOG: Final = 128
USER_TIMEOUT_MS: Final = 60_000
"""A peer that acknowledges nothing for so long is gone; it may as well be a destination that was stopped."""
_OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS),
)
# SO_SNDBUF and SO_RCVBUF are left alone: setting them stops the kernel's own tuning, which goes higher (tcp_wmem,
# tcp_rmem) than a process may ask for (wmem_max).

_Info = tuple[Any, ...]
C = TypeVar("C", bound=SocketConnection)


async def connect(address: TcpAddress, *, timeout: float) -> SocketConnection:
    """Connect; tries every address of the name in turn. Raises `LinkLost` within ``timeout`` seconds."""
    return await connect_as(address, SocketConnection, timeout=timeout)


async def connect_as(address: TcpAddress | TlsAddress, wrap: Callable[[socket.socket, str], C], *, timeout: float) -> C:
    """Connect, and return what ``wrap`` makes of the socket; raises as `connect` does."""
    problem = ""
    try:
        async with asyncio.timeout(timeout):
            for info in await _resolve(address, passive=False):
                try:
                    return await _connect_one(info, address, wrap)
                except OSError as err:
                    problem = _explain(err, address)
    except TimeoutError:
        raise LinkLost(
            f"{address} did not answer within {timeout:g} s: is the machine up, and does a firewall let port "
            f"{address.port} through?"
        ) from None
    raise LinkLost(problem)


async def listen(address: TcpAddress) -> SocketListener[SocketConnection]:
    """Listen; port 0 takes a free one. Raises `HostError` when the address can't be had."""
    return await listen_as(address, _accepted)


async def listen_as(address: TcpAddress | TlsAddress, wrap: Callable[[socket.socket, Any], C]) -> SocketListener[C]:
    """Listen for what ``wrap`` makes of the sockets that come; raises as `listen` does."""
    info = (await _resolve(address, passive=True))[0]
    sock = socket.socket(info[0], socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(info[4])
        sock.listen(BACKLOG)
    except OSError as err:
        sock.close()
        if err.errno == errno.EADDRINUSE:
            raise HostError(f"{address} is taken by another program: choose another port, or 0 for a free one") from err
        raise HostError(f"can't listen on {address}: {os.strerror(err.errno or 0)}") from err
    here = type(address)(host=address.host, port=sock.getsockname()[1])
    return SocketListener(sock, str(here), wrap)


async def _resolve(address: TcpAddress | TlsAddress, *, passive: bool) -> list[_Info]:
    flags = socket.AI_PASSIVE if passive else 0
    with contextlib.suppress(socket.gaierror, UnicodeError):  # a number needs no resolver and no thread
        return list(
            socket.getaddrinfo(address.host, address.port, 0, socket.SOCK_STREAM, 0, flags | socket.AI_NUMERICHOST)
        )
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=flags
        )
    except (OSError, UnicodeError) as err:
        why = err.strerror if isinstance(err, OSError) else "it is not a host name"
        raise HostError(f"the name {address.host!r} in {address} can't be resolved: {why}") from err
    return list(found)


async def _connect_one(info: _Info, address: TcpAddress | TlsAddress, wrap: Callable[[socket.socket, str], C]) -> C:
    sock = socket.socket(info[0], socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        tune(sock)
        await asyncio.get_running_loop().sock_connect(sock, info[4])
        _refuse_itself(sock)
        return wrap(sock, str(address))
    except BaseException:
        sock.close()
        raise


def _refuse_itself(sock: socket.socket) -> None:
    # Connecting to a port nobody listens on can meet itself when it is in the range for outgoing connections.
    if sock.getsockname() == sock.getpeername():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")


def _accepted(sock: socket.socket, name: Any) -> SocketConnection:
    tune(sock)
    return SocketConnection(sock, str(TcpAddress(host=name[0], port=name[1])))


def tune(sock: socket.socket) -> None:
    """Set what a connection of ours needs: small frames go at once, and a dead peer is noticed."""
    for level, option, value in _OPTIONS:
        sock.setsockopt(level, option, value)


def _explain(err: OSError, address: TcpAddress | TlsAddress) -> str:
    if err.errno == errno.ECONNREFUSED:
        return f"nobody listens at {address}: start `amig receive {address}` there"
    return f"can't connect to {address}: {os.strerror(err.errno) if err.errno else err}"
