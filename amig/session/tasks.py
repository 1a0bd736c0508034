"""Task-group manners: one error instead of a group."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from amig.aio import settle
from amig.errors import AmigError, LinkLost
from amig.stages.channel import BrokenChannel

T = TypeVar("T")


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors inside an exception group, however deep; the error itself when it is none."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def telling(error: BaseException) -> BaseException:
    """Return the one error of a group that says most: a bug first, then a reason of ours, a lost link last.

    When one side gives up, the other tasks see their connections end; those are consequences, not causes.
    """

    def rank(leaf: BaseException) -> int:
        if isinstance(leaf, BrokenChannel | asyncio.CancelledError):
            return 3
        if isinstance(leaf, LinkLost):
            return 2
        return 1 if isinstance(leaf, AmigError | OSError) else 0

    return min(leaves(error), key=rank)


@contextmanager
def one_error() -> Iterator[None]:
    """Raise the most telling error of a group in place of the group; for callers who must never meet one."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise telling(group) from group


async def apart(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` in a task of its own, and raise its most telling error; cancelling it is waited for.

    For work that may fail and be followed by more. A task group whose tasks fail cancels the task that it is in; until
    Python 3.13 that may strike only after the group's end, when the next thing is awaited. And an error that comes
    together with a cancellation from outside hides it. Here whoever is cancelled learns of it: `asyncio.CancelledError`
    is raised, unless the work had gone on to an error that is not a lost connection.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await settle(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            told = telling(error)
            if not isinstance(told, LinkLost | asyncio.CancelledError):
                raise told from None
        raise
    with one_error():
        return task.result()
