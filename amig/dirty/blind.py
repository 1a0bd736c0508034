"""D1: clear the whole range before reading it. **Loses pages**: the first attempt of the published discussion.

A page that the guest wrote after the last GET is not pending, so it is not sent; but it is cleared, and so no later
GET will name it.
"""

from __future__ import annotations

from typing import ClassVar

from amig.dirty.strategy import Bits, Returned, Step, Synced


class Blind:
    """Clear every bit of the range, known or not."""

    name: ClassVar[str] = "blind"
    manual: ClassVar[bool] = True
    one_exact_user: ClassVar[bool] = False
    unsafe: ClassVar[bool] = True

    def sync(self, fresh: Bits, cache: Bits) -> Synced[Bits]:
        """Hand all of it out; nothing is cached."""
        return Synced(cache, fresh)

    def take(self, mine: Bits, cache: Bits, whole: Bits, *, exact: bool) -> Step[Bits]:
        """Clear all ones."""
        return Step(whole, cache, mine & ~mine)

    def give_back(self, taken: Bits, cache: Bits) -> Returned[Bits]:
        """Make them pending again."""
        return Returned(cache, taken)
