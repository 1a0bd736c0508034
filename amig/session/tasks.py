"""Task-group manners: one error instead of a group, and work that must not be cancelled half-way."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

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


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` to its end even when cancelled meanwhile; then raise its error, or else the cancellation.

    For steps that leave a promise on disk, or a thread on memory that is about to go.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result
