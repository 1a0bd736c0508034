"""A person's terminal as a guest's: raw mode, and keys as they come, until Ctrl-]."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import threading
from collections.abc import Iterator

ESCAPE = b"\x1d"
"""Ctrl-], as telnet and virsh have it."""
ESCAPE_NAME = "Ctrl-]"


def is_terminal() -> bool:
    """Whether standard input and output are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


@contextlib.contextmanager
def raw_mode() -> Iterator[None]:
    """Let every key through, Ctrl-C too, for the length of the block; nothing to do without a terminal.

    Output keeps its processing: a line feed alone still starts a line.
    """
    if not is_terminal():
        yield
        return
    before = termios.tcgetattr(0)
    mode = termios.tcgetattr(0)
    mode[0] &= ~(
        termios.BRKINT | termios.ICRNL | termios.INLCR | termios.IGNCR | termios.ISTRIP | termios.IXON | termios.PARMRK
    )
    mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    termios.tcsetattr(0, termios.TCSAFLUSH, mode)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


class Keys:
    """Standard input, read on a thread of its own (a file or /dev/null can't be watched by an event loop).

    The thread is left in its read at the end: it holds nothing, and the process is about to go.
    """

    def __init__(self, *, escape: bool) -> None:
        """``escape``: Ctrl-] ends the keys."""
        self._escape = escape
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._room = threading.Semaphore(16)
        threading.Thread(target=self._main, name="keys", daemon=True).start()

    async def read(self) -> bytes:
        """Return what came, or ``b""`` at the end of the input and after the escape."""
        data = await self._queue.get()
        self._room.release()
        return data

    def _main(self) -> None:
        going = True
        while going:
            try:
                data = os.read(0, 4096)
            except OSError:
                data = b""
            going = bool(data)
            if self._escape and ESCAPE in data:
                data, going = data[: data.index(ESCAPE)], False
            self._room.acquire()
            try:
                if data:
                    self._loop.call_soon_threadsafe(self._queue.put_nowait, data)
                if not going:
                    self._loop.call_soon_threadsafe(self._queue.put_nowait, b"")
            except RuntimeError:  # the loop is closed: nobody wants keys any more
                return
