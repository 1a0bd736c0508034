"""Waiting for a thread's work to its end, whatever happens to the task that asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def settled(work: Coroutine[Any, Any, T], undo: Callable[[T], object] | None = None) -> T:
    """Return what ``work`` returns. Cancelled, it waits for the work to end, passes its result to ``undo``, and raises.

    Cancelling a task that waits for a thread leaves the thread running, on buffers and files that the caller then
    believes are free.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as err:
            cancelled = err
    if cancelled is None:
        return task.result()
    # Looked at in any case, so that asyncio does not report a failure as forgotten.
    if not task.cancelled() and task.exception() is None and undo is not None:
        undo(task.result())
    raise cancelled
