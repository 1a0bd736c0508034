"""``--log``: events as JSON lines in a file, written off the event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from amig.cli.say import encode
from amig.errors import UsageError
from amig.events import Event, Result

Write = Callable[[Event | Result], Awaitable[None]]


@asynccontextmanager
async def event_log(path: Path | None) -> AsyncIterator[Write]:
    """Yield what writes one event to ``path``, which is appended to; with None it does nothing.

    Raises `UsageError` when the file can't be opened. A disk that fails later ends the log, not the migration.
    """

    async def nothing(_: Event | Result) -> None:
        pass

    if path is None:
        yield nothing
        return
    import aiofiles

    from amig.cli import say

    try:
        file = await aiofiles.open(path, "a")
    except OSError as error:
        raise UsageError(f"--log {path}: {error.strerror}") from None
    broken = False

    async def write(event: Event | Result) -> None:
        nonlocal broken
        if broken:
            return
        try:
            await file.write(encode(event) + "\n")
            await file.flush()
        except OSError as error:
            broken = True
            say.warn(f"--log {path}: {error.strerror}; no more is written to it")

    try:
        yield write
    finally:
        try:
            await file.close()
        except OSError as error:
            say.warn(f"--log {path}: {error.strerror}")
