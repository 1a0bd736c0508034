"""Task-group manners: one error instead of a group."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from amig.errors import AmigError, LinkLost
from amig.stages.channel import BrokenChannel


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
