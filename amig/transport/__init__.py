"""What carries frames: tls, ssh, tcp, unix, file.

`connect` and `listen` take an address as an operator writes it; `Dialer` is for more than one connection to one peer.
"""

from __future__ import annotations

from typing import Final

from amig.transport import tcp, tls, unix
from amig.transport.address import PeerAddress, SocketAddress, TcpAddress, TlsAddress, parse_socket
from amig.transport.base import Connection, Listener
from amig.transport.dial import Dialer
from amig.transport.options import LinkOptions, TlsFiles, check_plain

CONNECT_TIMEOUT: Final = 10.0
"""Seconds."""

__all__ = [
    "CONNECT_TIMEOUT",
    "Connection",
    "Dialer",
    "LinkOptions",
    "Listener",
    "TlsFiles",
    "check_plain",
    "connect",
    "listen",
]


async def connect(
    address: str | PeerAddress, options: LinkOptions | None = None, *, timeout: float = CONNECT_TIMEOUT
) -> Connection:
    """Connect to a peer that listens; raises as `Dialer` and its `connect` do."""
    return await Dialer(address, options).connect(timeout=timeout)


async def listen(address: str | SocketAddress, options: LinkOptions | None = None) -> Listener:
    """Listen for peers; raises `HostError` when the address is taken, `UsageError` when it is none or not safe."""
    where = parse_socket(address) if isinstance(address, str) else address
    options = options or LinkOptions()
    if isinstance(where, TlsAddress):
        return await tls.listen(where, tls.server_context(options.tls))
    if isinstance(where, TcpAddress):
        check_plain(where, options, listening=True)
        return await tcp.listen(where)
    return await unix.listen(where)
