"""Whether pages that are sent again travel as differences or as wholes: the way that gets the migration somewhere."""

from __future__ import annotations

import math

PATIENCE = 8
"""Rounds without progress after which the other way is taken."""
PROGRESS = 0.75
"""What is left is progress when it is less than this part of the least before: less than that is luck."""


class DeltaChoice:
    """Differences at first; the other way by turns, whenever the present one gets nowhere.

    A difference spares the link and costs the processors of both sides. What outweighs what can't be told from one
    side's figures, only from what whole rounds come to: whether what is left after them becomes less.
    """

    def __init__(self) -> None:
        self.whole = False
        """Whether the pages of the next round are to travel as wholes."""
        self._least = math.inf
        self._idle = 0

    def round_ended(self, remaining: int) -> None:
        """Take in how many pages were dirty after a round."""
        if remaining < PROGRESS * self._least:
            self._least, self._idle = remaining, 0
            return
        self._idle += 1
        if self._idle == PATIENCE:
            self.whole = not self.whole
            self._least, self._idle = remaining, 0  # anew: neither way has to beat the other's luck
