"""D3: clear exactly the bits about to be sent, as proposed in QEMU's discussion. **Loses pages** with a second user.

The migration clears and sends P; the guest writes P again; another user, whose bit for P is stale, clears it in the
kernel; nobody tells the migration. With one user and no other source it is as good as D4.
"""

from __future__ import annotations

from typing import ClassVar

from amig.dirty.strategy import Bits, Returned, Step, Synced


class MigrationBitmap:
    """Clear all of ``mine``, whoever takes it, and tell nobody."""

    name: ClassVar[str] = "migration-bitmap"
    manual: ClassVar[bool] = True
    one_exact_user: ClassVar[bool] = False
    unsafe: ClassVar[bool] = True

    def sync(self, fresh: Bits, cache: Bits) -> Synced[Bits]:
        """Hand all of it out; nothing is cached."""
        return Synced(cache, fresh)

    def take(self, mine: Bits, cache: Bits, whole: Bits, *, exact: bool) -> Step[Bits]:
        """Clear what is taken."""
        return Step(mine, cache, mine & ~mine)

    def give_back(self, taken: Bits, cache: Bits) -> Returned[Bits]:
        """Make them pending again."""
        return Returned(cache, taken)
