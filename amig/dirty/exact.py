"""D4, amig's own: clear exactly what is about to be sent, and owe it to the other users in the same step.

The exact user (a migration) clears every bit that it takes, known to be set in the kernel or not, so that no page is
sent again without having been written after the clear. A bit that it clears beyond C may have been news to the others:
it becomes pending for each of them. Users to whom a double copy is cheap (a display, a meter) clear as in D2.
"""

from __future__ import annotations

from typing import ClassVar

from amig.dirty.strategy import Bits, Returned, Step, Synced


class Exact:
    """Clear all of ``mine`` for the exact user, ``mine & C`` for the others."""

    name: ClassVar[str] = "exact"
    manual: ClassVar[bool] = True
    one_exact_user: ClassVar[bool] = True
    unsafe: ClassVar[bool] = False

    def sync(self, fresh: Bits, cache: Bits) -> Synced[Bits]:
        """Remember what the kernel has set; all users get it."""
        return Synced(cache | fresh, fresh)

    def take(self, mine: Bits, cache: Bits, whole: Bits, *, exact: bool) -> Step[Bits]:
        """Clear what is taken; what C did not know is owed to everybody else."""
        if exact:
            return Step(mine, cache & ~mine, mine & ~cache)
        return Step(mine & cache, cache & ~mine, mine & ~mine)

    def give_back(self, taken: Bits, cache: Bits) -> Returned[Bits]:
        """Make them pending again; the next take clears them whether C knows them or not."""
        return Returned(cache, taken)
