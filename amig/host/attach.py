"""Opens a guest by name or socket: for a migrator, or for commands."""

from __future__ import annotations

from amig.control.client import SocketGuest
from amig.control.link import DEFAULT_TIMEOUT
from amig.control.operator import ControlClient
from amig.host.memory import MappedMemory
from amig.host.names import resolve


async def open_guest(source: str, *, client: str = "amig", timeout: float = DEFAULT_TIMEOUT) -> SocketGuest:
    """Open the guest named ``source`` (or whose control socket that is) in order to migrate it; close it at the end.

    Raises `NoSuchGuest`, `ControlError`, `UsageError`. ``timeout`` (seconds) bounds every request.
    """
    return await SocketGuest.connect(resolve(source), map_memory=MappedMemory.from_fds, client=client, timeout=timeout)


async def open_control(source: str, *, client: str = "amig", timeout: float = DEFAULT_TIMEOUT) -> ControlClient:
    """Open the host of the guest named ``source`` (or whose control socket that is) for commands."""
    return await ControlClient.connect(resolve(source), client=client, timeout=timeout)
