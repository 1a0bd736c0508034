"""Whether pages that are sent again travel as differences or as wholes: the way after which less is left."""

from __future__ import annotations

import math
from statistics import fmean

PATIENCE = 16
"""Rounds without progress after which the other way is tried."""
PROGRESS = 0.75
"""What is left is progress when it is less than this part of what was left before: less than that is luck."""
TRIAL = 8
"""Rounds for which the other way is tried. The first half of them is still about what the way before has left."""
WEARY = 4
"""How much more patience there is after a trial that was in vain."""


class DeltaChoice:
    """Differences at first; the other way is tried when the present one gets nowhere, and kept if it gets somewhere.

    A difference spares the link and costs the processors of both sides. What outweighs what can't be told from one
    side's figures, only from what whole rounds come to: how much is left after them.
    """

    def __init__(self) -> None:
        self.whole = False
        """Whether the pages of the next round are to travel as wholes."""
        self._patience = PATIENCE
        self._least = math.inf
        self._idle = 0
        self._seen: list[float] = []
        self._usual: float | None = None  # what the way before a trial left; None: there is none under way

    def round_ended(self, remaining: float) -> None:
        """Take in how much was dirty after a round, in bytes."""
        self._seen = [*self._seen[1 - TRIAL :], remaining]
        if self._usual is None:
            self._idle = 0 if remaining < PROGRESS * self._least else self._idle + 1
            self._least = remaining if not self._idle else self._least
            if self._idle == self._patience:
                self._turn(usual=fmean(self._seen))
        else:
            self._idle += 1
            if self._idle == TRIAL:
                self._judge(self._usual)

    def _judge(self, usual: float) -> None:
        if fmean(self._seen[TRIAL // 2 :]) < PROGRESS * usual:
            self._patience = PATIENCE
            self._begin(usual=None)
        else:
            self._patience *= WEARY
            self._turn(usual=None)

    def _turn(self, usual: float | None) -> None:
        self.whole = not self.whole
        self._begin(usual=usual)

    def _begin(self, usual: float | None) -> None:
        self._usual, self._least, self._idle = usual, math.inf, 0
