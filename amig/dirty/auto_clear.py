"""D0: reading the log clears it. The only way without KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.

Safe for any number of users. A page is write-protected again when the round starts, and may be written at any time
until it is read: of all safe designs this one sends the most pages twice.
"""

from __future__ import annotations

from typing import ClassVar

from amig.dirty.strategy import Bits, Returned, Step, Synced


class AutoClear:
    """GET has cleared everything already; taking clears nothing, and there is nothing to cache."""

    name: ClassVar[str] = "auto-clear"
    manual: ClassVar[bool] = False
    one_exact_user: ClassVar[bool] = False
    unsafe: ClassVar[bool] = False

    def sync(self, fresh: Bits, cache: Bits) -> Synced[Bits]:
        """Hand all of it out; what GET returned is no longer set in the kernel, so C stays empty."""
        return Synced(cache, fresh)

    def take(self, mine: Bits, cache: Bits, whole: Bits, *, exact: bool) -> Step[Bits]:
        """Clear nothing."""
        nothing = mine & ~mine
        return Step(nothing, cache, nothing)

    def give_back(self, taken: Bits, cache: Bits) -> Returned[Bits]:
        """Make them pending again."""
        return Returned(cache, taken)
