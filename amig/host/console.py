"""Where a guest's serial output goes: a file, any number of attached terminals, and a scrollback for those to come.

`Console.write` is called on vCPU threads and never blocks: every consumer has a bounded buffer, and one that falls
behind loses the oldest part, with a note in its place.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from amig.errors import HostError, UsageError

log = logging.getLogger(__name__)

SCROLLBACK_BYTES = 64 << 10
CLIENT_BYTES = 256 << 10
FILE_BYTES = 4 << 20
MAX_CLIENTS = 64
_CLOSE_SECONDS = 5.0


class _Pending:
    """Output that a consumer has not taken yet: bounded, the oldest part gives way."""

    def __init__(self, limit: int, data: bytes = b"") -> None:
        self._limit = limit
        self._data = bytearray(data[-limit:])
        self._lost = 0

    def __bool__(self) -> bool:
        return bool(self._data)

    def add(self, data: bytes) -> None:
        self._data += data
        excess = len(self._data) - self._limit
        if excess > 0:
            del self._data[:excess]
            self._lost += excess

    def take(self) -> bytes:
        data = bytes(self._data)
        if self._lost:
            data = b"\r\n[amig: %d bytes of console output dropped]\r\n" % self._lost + data
        self._data.clear()
        self._lost = 0
        return data


class ConsoleClient:
    """One attached terminal. Made by `Console.attach`; `close` detaches it."""

    def __init__(self, console: Console, notify: Callable[[], None], scrollback: bytes) -> None:
        self._console = console
        self._notify = notify
        self._lock = threading.Lock()
        self._pending = _Pending(CLIENT_BYTES, scrollback)

    def take(self) -> bytes:
        """Return all output since the last call (first of all the scrollback); empty when there is none."""
        with self._lock:
            return self._pending.take()

    def close(self) -> None:
        """Detach; idempotent."""
        self._console.detach(self)

    def _feed(self, data: bytes) -> None:
        with self._lock:
            was_empty = not self._pending
            self._pending.add(data)
        if was_empty:
            self._notify()


class _FileWriter:
    """Appends to a file on a thread of its own, as soon as there is something."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # Not blocking at first: opening a pipe that nobody reads would wait for ever.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
            self._fd = os.open(path, flags, 0o600)
            os.set_blocking(self._fd, True)
        except OSError as error:
            raise HostError(f"can't open {path} for the guest's console: {error.strerror}") from error
        self._changed = threading.Condition()
        self._pending = _Pending(FILE_BYTES)
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="console-file", daemon=True)
        self._thread.start()

    def feed(self, data: bytes) -> None:
        with self._changed:
            self._pending.add(data)
            self._changed.notify()

    def close(self) -> None:
        """Write out what is left; gives up on a file that takes nothing for some seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():  # it closes the file itself, once it can
            log.warning("the end of the console output could not be written to %s in time", self._path)

    def _main(self) -> None:
        try:
            while data := self._next():
                self._write(data)
        except OSError as error:
            log.warning("console output to %s ends here: %s", self._path, error.strerror)
        finally:
            os.close(self._fd)

    def _next(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closing)
            return self._pending.take()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]


class Console:
    """Fans a guest's serial output out. Thread-safe; ``path`` None: to attached clients only."""

    def __init__(self, path: Path | None = None) -> None:
        """Raise `HostError` when the file can't be opened for appending (it is made with mode 0600)."""
        self._lock = threading.Lock()
        self._clients: list[ConsoleClient] = []
        self._scrollback = bytearray()
        self._file = _FileWriter(path) if path is not None else None
        self._closed = False

    @classmethod
    def parse(cls, words: str) -> Console:
        """Make what ``--serial`` asks for: ``none`` or ``file:PATH``; raises `UsageError`."""
        if words == "none":
            return cls()
        kind, _, path = words.partition(":")
        if kind != "file" or not path:
            raise UsageError(f"--serial {words}: it is 'none' or 'file:PATH'")
        return cls(Path(path))

    def write(self, data: bytes) -> None:
        """Take output; never blocks, dropped after `close`."""
        with self._lock:
            if self._closed:
                return
            self._scrollback += data
            if len(self._scrollback) > 2 * SCROLLBACK_BYTES:  # trimmed now and then, not at every byte
                del self._scrollback[:-SCROLLBACK_BYTES]
            if self._file is not None:
                self._file.feed(data)
            for client in self._clients:
                client._feed(data)

    def attach(self, notify: Callable[[], None]) -> ConsoleClient:
        """Attach a terminal; it starts with the scrollback.

        ``notify`` is called, from any thread, when output arrives where there was none; it must not block, nor call
        back into the console. (An event loop passes ``lambda: loop.call_soon_threadsafe(event.set)``.) Raises
        `HostError` beyond `MAX_CLIENTS`.
        """
        with self._lock:
            if len(self._clients) >= MAX_CLIENTS:
                raise HostError(f"{MAX_CLIENTS} terminals are attached to this guest already: close one")
            client = ConsoleClient(self, notify, bytes(self._scrollback[-SCROLLBACK_BYTES:]))
            self._clients.append(client)
        return client

    def detach(self, client: ConsoleClient) -> None:
        """Detach a terminal; nothing to do when it is not attached."""
        with self._lock:
            if client in self._clients:
                self._clients.remove(client)

    def close(self) -> None:
        """Write the file's rest out and drop all clients; idempotent. Blocks for some seconds at most."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._clients.clear()
        if self._file is not None:
            self._file.close()
