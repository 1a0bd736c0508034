"""A thread that moves the pages of one connection one way, while the event loop prepares the next.

The kernel's copy of a block keeps a processor busy for a millisecond. On the event loop that is time in which no page
is hashed, no chunk is taken, and no other connection moves. The calls release the interpreter, so a thread for each
connection does it, and connections copy side by side. It works on a descriptor of its own (a number that was closed and
given out again would be somebody else's file), and nobody goes on, cancelled or not, before it has left the memory.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, NamedTuple

from amig.aio import settle

WORTH_BYTES: Final = 2 << 20
"""A transfer of less is done before a thread has woken up."""


class _Work(NamedTuple):
    step: Callable[[int], bool]
    done: asyncio.Future[None]


class Mover:
    """One thread, which lives until `stop`, for the descriptor of a non-blocking stream."""

    def __init__(self, fd: int, event: int) -> None:
        """``event`` is what to wait for when nothing can be moved: ``select.POLLIN`` or ``POLLOUT``.

        Raises `OSError` where there is no descriptor, or no thread, to be had.
        """
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._fd = os.dup(fd)
        except OSError:
            os.close(self._stop)
            raise
        self._poll = select.poll()
        self._poll.register(self._fd, event)
        self._poll.register(self._stop, select.POLLIN)
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._stopped = False
        self._moving = False
        try:
            threading.Thread(target=self._serve, name="amig-move", daemon=True).start()
        except RuntimeError as error:
            self._close()
            raise OSError(errno.EAGAIN, str(error)) from error

    async def run(self, step: Callable[[int], bool]) -> bool:
        """Have the thread call ``step(descriptor)`` until it returns False; a `BlockingIOError` of it means: wait.

        Returns True then, and False when `stop` came first. Raises what ``step`` raises. Cancelled, it stops the thread
        for good and returns when it is out of ``step``. One at a time.
        """
        if self._stopped:
            return False
        # Not an executor: its locks and two futures for each block take as long as all the rest that Python does here.
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._moving = True
        self._queue.put(_Work(step, done))
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            self.stop()
            await settle(done)
            done.exception()  # seen: the cancellation is what is told
            raise
        else:
            return not self._stopped
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
        self._queue.put(None)
        if not self._moving:
            self._close()

    def _close(self) -> None:
        os.close(self._fd)
        os.close(self._stop)

    # on the thread

    def _serve(self) -> None:
        while (work := self._queue.get()) is not None:
            error: BaseException | None = None
            try:
                self._move(work.step)
            except BaseException as caught:
                error = caught
            work.done.get_loop().call_soon_threadsafe(_tell, work.done, error)
            del work, error

    def _move(self, step: Callable[[int], bool]) -> None:
        while not self._stopped:
            try:
                if not step(self._fd):
                    return
            except BlockingIOError:
                self._poll.poll()


def _tell(done: asyncio.Future[None], error: BaseException | None) -> None:
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
