"""KVM's dirty ring: entries that a GET has named are reset, and so protected again, just before they are read.

The ring replaces GET and CLEAR for the whole VM, so it is chosen when the host starts, and then there is nothing else.
To a strategy it looks like a log that is cleared by choice (`amig.host.ring_log`), with one difference: it is reset in
the order of the writes, so that clearing a page clears also what was written before it. All of that has been handed to
every user, so nothing is lost by it: those pages are only protected earlier than they had to be, at worst (a guest
that writes at random) all of them when the first is taken.
"""

from __future__ import annotations

from typing import ClassVar

from amig.dirty.strategy import Bits, Returned, Step, Synced


class Ring:
    """As `SlotCache`: clear ``mine & C``. The ring can't protect a page that none of its entries names."""

    name: ClassVar[str] = "ring"
    manual: ClassVar[bool] = True
    one_exact_user: ClassVar[bool] = False
    unsafe: ClassVar[bool] = False

    def sync(self, fresh: Bits, cache: Bits) -> Synced[Bits]:
        """Remember which pages the ring's entries name; all users get them."""
        return Synced(cache | fresh, fresh)

    def take(self, mine: Bits, cache: Bits, whole: Bits, *, exact: bool) -> Step[Bits]:
        """Reset the entries that name what is taken."""
        return Step(mine & cache, cache & ~mine, mine & ~mine)

    def give_back(self, taken: Bits, cache: Bits) -> Returned[Bits]:
        """Make them pending again; they are not in C, for no entry names them any more."""
        return Returned(cache, taken)
