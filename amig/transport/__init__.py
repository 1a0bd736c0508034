"""What carries frames: tcp, unix, file.

`connect` and `listen` take an address as an operator writes it.
"""

from __future__ import annotations

from typing import Final

from amig.transport import tcp, unix
from amig.transport.address import SocketAddress, TcpAddress, parse_socket
from amig.transport.base import Connection, Listener

CONNECT_TIMEOUT: Final = 10.0
"""Seconds."""

__all__ = ["CONNECT_TIMEOUT", "Connection", "Listener", "connect", "listen"]


async def connect(address: str | SocketAddress, *, timeout: float = CONNECT_TIMEOUT) -> Connection:
    """Connect to a peer that listens; raises `LinkLost` (nobody there), `HostError` (no such name), `UsageError`."""
    where = parse_socket(address) if isinstance(address, str) else address
    if isinstance(where, TcpAddress):
        return await tcp.connect(where, timeout=timeout)
    return await unix.connect(where, timeout=timeout)


async def listen(address: str | SocketAddress) -> Listener:
    """Listen for peers; raises `HostError` when the address is taken, `UsageError` when it is none."""
    where = parse_socket(address) if isinstance(address, str) else address
    if isinstance(where, TcpAddress):
        return await tcp.listen(where)
    return await unix.listen(where)
