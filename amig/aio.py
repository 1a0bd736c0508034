"""Work that must not be abandoned half-way when its caller is cancelled.

A thread goes on when the task that waits for it is cancelled, and so does another process; what they use is closed
next. So whoever waits for such work sees its end first, and only then lets the cancellation pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


async def settle(future: asyncio.Future[T]) -> asyncio.CancelledError | None:
    """Wait until ``future`` is done, whatever happens to the caller; return the cancellation that came meanwhile.

    The caller re-raises what it gets once it has tidied up.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        waiter = future.get_loop().create_future()  # as asyncio.wait, of which a chunk's take can't afford the rest
        future.add_done_callback(partial(_wake, waiter))
        try:
            await waiter
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


def _wake(waiter: asyncio.Future[None], _: asyncio.Future[Any]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def finish(future: asyncio.Future[T], undo: Callable[[T], object] | None = None) -> T:
    """Return the future's result; when cancelled, wait for its end, pass the result to ``undo``, and raise."""
    cancelled = await settle(future)
    if cancelled is None:
        return future.result()
    # Looked at in any case, so that asyncio does not report a failure as forgotten.
    if not future.cancelled() and future.exception() is None and undo is not None:
        undo(future.result())
    raise cancelled


async def settled(work: Coroutine[Any, Any, T], undo: Callable[[T], object] | None = None) -> T:
    """As `finish`, for a coroutine."""
    return await finish(asyncio.ensure_future(work), undo)


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` to its end even when cancelled meanwhile; then raise its error, or else the cancellation.

    For steps that leave a promise on disk: how they went is more than that somebody was impatient.
    """
    task = asyncio.ensure_future(work)
    cancelled = await settle(task)
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result
