"""One event loop for all inputs of a process: making one for each would take most of the time."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Coroutine
from typing import Any

_runner: asyncio.Runner | None = None


def complete(work: Coroutine[Any, Any, object]) -> None:
    """Run it to its end; whatever it has left running is an error."""
    global _runner
    if _runner is None:
        _runner = asyncio.Runner()
        atexit.register(close)
    _runner.run(_whole(work))


async def _whole(work: Coroutine[Any, Any, object]) -> None:
    await work
    for _ in range(3):  # what was cancelled last has had no turn yet
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"these are still running: {left}"


def close() -> None:
    """Close the loop; the next input makes another one."""
    global _runner
    if _runner is not None:
        _runner.close()
        _runner = None
