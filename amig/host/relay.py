"""Carries the serial port's bytes between the guest and those who look at it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

from amig.host.hosted import HostedGuest

HISTORY = 64 << 10
"""Bytes of output that are remembered for those who come late."""
MAX_WAITING = 1 << 20
"""Bytes between the guest and the event loop; more is lost to listeners, not to sinks."""

Sink = Callable[[bytes], None]
Listener = Callable[[bytes], None]
_log = logging.getLogger(__name__)


class ConsoleRelay:
    """Implements `amig.host.session.Console`. Give `write` to the machine as its serial port's sink.

    ``sinks`` (a file, a terminal) get every byte on the guest's own thread, before anybody else; one that raises is
    dropped with a line in the log, for a full disk must not stop a guest.
    """

    def __init__(self, hosted: HostedGuest, sinks: tuple[Sink, ...] = ()) -> None:
        self._hosted = hosted
        self._sinks = list(sinks)
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._scheduled = False
        self._history = bytearray()
        self._listeners: list[Listener] = []

    def write(self, data: bytes) -> None:
        """Take the guest's output; thread-safe, never waits for a listener."""
        for sink in tuple(self._sinks):
            try:
                sink(data)
            except Exception:
                _log.exception("a sink of the serial port failed and gets no more")
                self._sinks.remove(sink)
        with self._lock:
            self._waiting += data
            if len(self._waiting) > MAX_WAITING:
                del self._waiting[: len(self._waiting) - MAX_WAITING]
            if self._scheduled:
                return
            self._scheduled = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            data = bytes(self._waiting)
            self._waiting.clear()
            self._scheduled = False
        self._history += data
        del self._history[: max(0, len(self._history) - HISTORY)]
        for listener in tuple(self._listeners):
            listener(data)

    @property
    def attached(self) -> int:
        """How many listen."""
        return len(self._listeners)

    def attach(self, listener: Listener, *, replay: bool) -> None:
        """Call ``listener`` with what comes, on the event loop; with ``replay`` first with what came lately."""
        if listener in self._listeners:
            return
        self._deliver()
        if replay and self._history:
            listener(bytes(self._history))
        self._listeners.append(listener)

    def detach(self, listener: Listener) -> None:
        """Stop that; idempotent."""
        with contextlib.suppress(ValueError):
            self._listeners.remove(listener)

    async def feed(self, data: bytes) -> None:
        """Bytes for the guest; raises `ControlError` where there is none yet."""
        machine = self._hosted.machine
        await self._hosted.vm.call(machine.serial_input, data)
