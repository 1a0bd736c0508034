"""Waiting for descriptors; standard asyncio and uvloop alike."""

from __future__ import annotations

import asyncio


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
