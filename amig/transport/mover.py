"""A thread that moves the pages of one connection one way, while the event loop prepares the next.

The kernel's copy of a block keeps a processor busy for a millisecond. On the event loop that is time in which no page
is hashed, no chunk is taken, and no other connection moves. The calls release the interpreter, so a thread for each
connection does it, and connections copy side by side. It works on a descriptor of its own (a number that was closed and
given out again would be somebody else's file), and nobody goes on, cancelled or not, before it has left the memory.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from amig.aio import settle

WORTH_BYTES: Final = 1 << 20
"""A transfer of less is done before a thread has woken up."""


class Mover:
    """One thread, started when it is first needed, for the descriptor of a non-blocking stream."""

    def __init__(self, fd: int, event: int) -> None:
        """``event`` is what to wait for when nothing can be moved: ``select.POLLIN`` or ``POLLOUT``."""
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._fd = os.dup(fd)
        except OSError:
            os.close(self._stop)
            raise
        self._poll = select.poll()
        self._poll.register(self._fd, event)
        self._poll.register(self._stop, select.POLLIN)
        self._thread = ThreadPoolExecutor(1, "amig-move")
        self._stopped = False
        self._moving = False

    async def run(self, step: Callable[[int], bool]) -> bool:
        """Have the thread call ``step(descriptor)`` until it returns False; a `BlockingIOError` of it means: wait.

        Returns True then, and False when `stop` came first. Raises what ``step`` raises. Cancelled, it stops the thread
        for good and returns when it is out of ``step``.
        """
        if self._stopped:
            return False
        self._moving = True
        work = asyncio.wrap_future(self._thread.submit(self._work, step))
        try:
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                self.stop()
                await settle(work)
                if not work.cancelled():
                    work.exception()  # seen: the cancellation is what is told
                raise
            return work.result()
        finally:
            self._moving = False
            if self._stopped:
                self._close()

    def stop(self) -> None:
        """End the thread, and what it is at, before its next call of ``step``. Idempotent; does not wait."""
        if self._stopped:
            return
        self._stopped = True
        os.eventfd_write(self._stop, 1)
        self._thread.shutdown(wait=False)
        if not self._moving:
            self._close()

    def _close(self) -> None:
        os.close(self._fd)
        os.close(self._stop)

    def _work(self, step: Callable[[int], bool]) -> bool:
        while not self._stopped:
            try:
                if not step(self._fd):
                    return True
            except BlockingIOError:
                self._poll.poll()
        return False
