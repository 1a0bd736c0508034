"""D2: clear only bits that a GET has returned and that nobody has cleared since. QEMU's design (KVMSlot.dirty_bmap).

Safe for any number of users, because C is a subset of every user's pending bits: GET adds to C and to all of them, a
user that takes a bit removes it from C in the same step. Whoever clears a bit, all other users still have it pending.
A bit that is pending but not in C (from another source, given back, or of a page whose log did not start all set)
can't be cleared, and its page is sent again when the guest had written it too.
"""

from __future__ import annotations

from typing import ClassVar

from amig.dirty.strategy import Bits, Returned, Step, Synced


class SlotCache:
    """Clear ``mine & C``, and forget it in C: clearing twice is a no-op, so no user can clear another's news."""

    name: ClassVar[str] = "slot-cache"
    manual: ClassVar[bool] = True
    one_exact_user: ClassVar[bool] = False
    unsafe: ClassVar[bool] = False

    def sync(self, fresh: Bits, cache: Bits) -> Synced[Bits]:
        """Remember what the kernel has set; all users get it."""
        return Synced(cache | fresh, fresh)

    def take(self, mine: Bits, cache: Bits, whole: Bits, *, exact: bool) -> Step[Bits]:
        """Clear the known part of what is taken."""
        return Step(mine & cache, cache & ~mine, mine & ~mine)

    def give_back(self, taken: Bits, cache: Bits) -> Returned[Bits]:
        """Make them pending again; they are not in C, for they may be clear in the kernel."""
        return Returned(cache, taken)
