"""Where a guest's serial output goes beside the terminals that attach: a file, or this process's own output.

`SerialOutput` is a sink of `amig.host.relay.ConsoleRelay`: called on vCPU threads, it never blocks. What it writes to
may be slow; its buffer is bounded, and when that is full the oldest part gives way, with a note in its place.
"""

from __future__ import annotations

import enum
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from amig.errors import HostError, UsageError

log = logging.getLogger(__name__)

BUFFER_BYTES = 4 << 20
_CLOSE_SECONDS = 5.0
FORMS = "file:PATH, stdio or none"


class SerialOutput:
    """Writes to a descriptor, which it owns, on a thread of its own, as soon as there is something. Thread-safe."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._changed = threading.Condition()
        self._pending = bytearray()
        self._lost = 0
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="serial-output", daemon=True)
        self._thread.start()

    @classmethod
    def append(cls, path: Path) -> SerialOutput:
        """Append to a file, made with mode 0600 where there is none; raises `HostError` when it can't be opened."""
        try:
            # Not blocking at first: opening a pipe that nobody reads would wait for ever.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
            fd = os.open(path, flags, 0o600)
            os.set_blocking(fd, True)
        except OSError as error:
            raise HostError(f"can't open {path} for the guest's serial port: {error.strerror}") from error
        return cls(fd, str(path))

    @classmethod
    def stdout(cls) -> SerialOutput:
        """Write to this process's standard output."""
        return cls(os.dup(1), "the standard output")

    def __call__(self, data: bytes) -> None:
        """Take output; never blocks, dropped after `close`."""
        with self._changed:
            if self._closing:
                return
            self._pending += data
            excess = len(self._pending) - BUFFER_BYTES
            if excess > 0:
                del self._pending[:excess]
                self._lost += excess
            self._changed.notify()

    def close(self) -> None:
        """Write out what is left; gives up on what takes nothing for some seconds. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():  # it closes the descriptor itself, once it can
            log.warning("the end of the serial output could not be written to %s in time", self._name)

    def _main(self) -> None:
        try:
            while data := self._next():
                view = memoryview(data)
                while view:
                    view = view[os.write(self._fd, view) :]
        except OSError as error:
            log.warning("serial output to %s ends here: %s", self._name, error.strerror)
        finally:
            os.close(self._fd)

    def _next(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closing)
            data = bytes(self._pending)
            if self._lost:
                data = b"\r\n[amig: %d bytes of serial output dropped]\r\n" % self._lost + data
            self._pending.clear()
            self._lost = 0
            return data


class SerialKind(enum.Enum):
    """What ``--serial`` can name."""

    NONE = "none"
    FILE = "file"
    STDIO = "stdio"


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialChoice:
    """``--serial``, parsed: ``none`` (terminals can attach all the same), ``file:PATH`` or ``stdio``."""

    kind: SerialKind = SerialKind.NONE
    path: Path | None = None

    @classmethod
    def parse(cls, words: str) -> SerialChoice:
        """Return what ``words`` ask for; raises `UsageError`."""
        if words in ("none", "stdio"):
            return cls(kind=SerialKind(words))
        kind, _, path = words.partition(":")
        if kind != "file" or not path:
            raise UsageError(f"--serial {words}: write {FORMS}")
        return cls(kind=SerialKind.FILE, path=Path(path))

    def open(self) -> SerialOutput | None:
        """Return the sink, to be closed by the caller, or None for ``none``; raises `HostError`."""
        if self.kind is SerialKind.STDIO:
            return SerialOutput.stdout()
        return SerialOutput.append(self.path) if self.path is not None else None
