"""A listening socket; what it is bound to is the business of tcp.py and unix.py."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from amig.errors import HostError
from amig.transport.sock import SocketConnection

C = TypeVar("C", bound=SocketConnection)

_PASSING: Final = (errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH)
_FULL: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_FULL_PAUSE: Final = 0.1


class SocketListener(Generic[C]):
    """`Listener` over a bound, listening socket, which it owns."""

    def __init__(
        self,
        sock: socket.socket,
        address: str,
        wrap: Callable[[socket.socket, Any], C],
        *,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._address = address
        self._wrap = wrap
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def address(self) -> str:
        """Where it listens, with the real port."""
        return self._address

    async def accept(self) -> C:
        """Return the next connection; cancelling loses none, since one is taken only after the last wait."""
        if self._waiter is not None:
            raise RuntimeError("two tasks accept on one listener at the same time")
        while not self._closed:
            try:
                sock, name = self._sock.accept()
            except BlockingIOError:
                await self._wait()
            except OSError as err:
                if err.errno in _FULL:
                    await asyncio.sleep(_FULL_PAUSE)
                elif err.errno not in _PASSING:
                    raise HostError(f"can't accept on {self._address}: {os.strerror(err.errno or 0)}") from err
            else:
                try:
                    return self._wrap(sock, name)
                except OSError:
                    sock.close()  # gone before it was looked at
        raise HostError(f"the listener on {self._address} is closed")

    async def close(self) -> None:
        """Stop listening; a task in `accept` gets `HostError`."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(RuntimeError):
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._on_close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = waiter = self._loop.create_future()
        self._loop.add_reader(self._sock.fileno(), _wake, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            if not self._closed:
                self._loop.remove_reader(self._sock.fileno())


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
