"""Waiting for descriptors and for work that must not be abandoned; standard asyncio and uvloop alike."""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")


async def settle(future: asyncio.Future[T]) -> asyncio.CancelledError | None:
    """Wait until ``future`` is done, whatever happens to the caller; return the cancellation that came meanwhile.

    For work that goes on in a thread or in another process when its caller is cancelled: the caller has to see its
    end, because what it uses is closed next. The caller re-raises what it gets once it has tidied up.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


async def finish(future: asyncio.Future[T]) -> T:
    """Return the future's result; when cancelled, wait for its end first, then raise the cancellation."""
    cancelled = await settle(future)
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # seen: what went wrong in work nobody wants any more is not reported
        raise cancelled
    return future.result()


async def readable(fd: int) -> None:
    """Wait until ``fd`` can be read; one waiter a descriptor."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def writable(fd: int) -> None:
    """Wait until ``fd`` can be written; one waiter a descriptor."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(fd, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
