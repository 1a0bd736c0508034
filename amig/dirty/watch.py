"""Looks at one small range of guest memory often, as a display does with its framebuffer."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from amig.dirty.hub import DirtyLogHub
from amig.memory import Words


class RangeWatcher:
    """A user of the log that cares for one range only. A context manager; its calls block.

    It shares the log with whoever else uses it, and takes away nothing from them: what it learns of the range all users
    learn, and it clears in the kernel only what all of them were told of.
    """

    def __init__(self, hub: DirtyLogHub, region: int, first: int, count: int, *, name: str = "watcher") -> None:
        """Watch ``count`` pages of a region from page ``first`` on; neither needs to be aligned.

        Raises `ControlError` (``bad-range``, ``busy``, ``log-failed``).
        """
        self.region, self.first, self.count = region, first, count
        self._user = hub.open(name)
        try:
            self._generation = self._user.started.generation
            self._user.take_and_clear(region, first, count, self._generation)
        except BaseException:
            self._user.close()
            raise

    def changed(self) -> Words:
        """Return the pages that were written since the last call (or since the beginning), bit 0 being ``first``.

        They may be read once this has returned; what is written later comes with the next call. Raises `ControlError`
        with code ``stale-generation`` after memory slots have changed: make a new watcher then.
        """
        return self._user.look(self.region, self.first, self.count, self._generation)

    def close(self) -> None:
        """Leave the log. Idempotent."""
        self._user.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
