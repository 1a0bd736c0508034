"""One page, and what every step of anyone does to it.

Designs treat pages alike and apart: the functions of a strategy are bitwise, and GET and CLEAR copy and clear bits. So
a step is a function of one page's state, and a step that concerns many pages (a GET, the take of a chunk, a broken
connection) is that function applied to each of them. The strategies are called with ints of one bit.

Contents need no versions. A write makes every copy of the page stale, a read makes a copy that is not, and nothing but
that difference is ever asked for. For the same reason a write during a CLEAR is the same as one before it: it may slip
through an old TLB entry, but it is in memory when CLEAR returns, and the read comes later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from amig.dirty.strategy import Strategy
from amig.sim.proof.rules import Broken, Rules


class Page(NamedTuple):
    """State of a page; all are 0 or 1. Those marked *ghost* decide nothing, they are what the properties speak of."""

    kernel: int = 0
    """Set in the kernel's bitmap, or named by an entry of the ring; a page that is not is write-protected."""
    buffered: int = 0
    """Ring: written, and known to the CPU's own buffer only, which it hands over when it leaves the guest."""
    returned: int = 0
    """Ring: a GET has returned the entry, which is still there: the page is writable, and nobody hears of it."""
    kept: int = 0
    """Ring: its entry was reset before a GET returned it; the next GET will."""
    early: int = 0
    """Ghost, ring: 1 when it was protected before its take, because of another page or a full ring; 2 when written
    after that."""
    cache: int = 0
    """In C."""
    pending: int = 0
    """The migration's."""
    taken: int = 0
    """By the migration, not read yet."""
    unread: int = 0
    """Read, and not yet cleared (`Broken.READ_FIRST`)."""
    flying: int = 0
    """Read by the migration, not placed yet."""
    unacked: int = 0
    """Placed, and the source does not know."""
    stale: int = 1
    """Ghost: what the destination holds is not what memory holds."""
    unmarked: int = 0
    """Written by another source that has not marked it yet; with `Broken.MARK_FIRST` marked and not yet written."""
    since_read: int = 1
    """Ghost: the migration has a reason to read it: written, or lost, since it last did."""
    since_take: int = 0
    """Ghost: written since the clear that belongs to the migration's last read."""
    since_get: int = 0
    """Ghost: written since the last GET (where that is what clears)."""
    late: int = 0
    """Ghost: another source marked it since the migration's last take."""
    pending1: int = 0
    """The display's."""
    missed1: int = 1
    """Ghost: written since the display's last take."""
    pending2: int = 0
    """The meter's."""
    missed2: int = 1
    """Ghost: written since the meter's last take."""


Step = Callable[[Page], Page]


def start(rules: Rules) -> Page:
    """Return a page as it is when the log has been switched on for the first user, all of them being there."""
    strategy = rules.strategy
    log = int(strategy.manual and rules.initially_set and not rules.ring)
    others = {f"pending{i}": 1 for i in range(1, rules.users)} | {f"missed{i}": 0 for i in range(rules.users, 3)}
    if rules.broken is Broken.CLEAR_FIRST:  # nothing is pending, the log is to say what is
        others = dict.fromkeys(others, 0)
        return Steps(rules).sync(Page(**others))
    page = Page(kernel=log, pending=1, **others)
    return Steps(rules).sync(page) if strategy.manual else page


def without_migration(page: Page) -> Page:
    """Return a page as it is when the display has switched the log on."""
    return page._replace(pending=0, stale=0, since_read=0)


class Steps:
    """Every step, for one configuration."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.strategy: Strategy = rules.strategy
        self.exact = self.strategy.one_exact_user
        self.all_exact = rules.broken is Broken.TWO_EXACT

    # Writers.

    def write(self, page: Page) -> Page:
        """The guest writes it."""
        if self.rules.buffers:
            return self._written(page._replace(buffered=page.buffered | (1 - page.kernel)))
        return self._written(page._replace(kernel=1))

    def host_write(self, page: Page) -> Page:
        """The host writes it on behalf of the kernel, which logs it."""
        return self._written(page._replace(kernel=1))

    def flush(self, page: Page) -> Page:
        """A CPU leaves the guest and hands its buffer over to the ring."""
        return page._replace(kernel=1, buffered=0) if page.buffered else page

    def external_write(self, page: Page) -> Page:
        """Another source writes it."""
        if self.rules.broken is Broken.MARK_FIRST:
            return self._written(page)._replace(unmarked=0) if page.unmarked else page
        return self._written(page)._replace(unmarked=1)

    def external_mark(self, page: Page) -> Page:
        """Another source marks what it has written."""
        if self.rules.broken is Broken.MARK_FIRST:
            return self._marked(page)._replace(unmarked=1)
        return self._marked(page)._replace(unmarked=0, late=1) if page.unmarked else page

    def _written(self, page: Page) -> Page:
        page = page._replace(stale=1, since_read=1, since_take=1)
        if not self.strategy.manual:
            page = page._replace(since_get=1)
        if page.early:
            page = page._replace(early=2)
        return page._replace(missed1=int(self.rules.users > 1), missed2=int(self.rules.users > 2))

    def _marked(self, page: Page) -> Page:
        return self._hand_out(page, 1)

    def _hand_out(self, page: Page, news: int) -> Page:
        return page._replace(
            pending=page.pending | news,
            pending1=page.pending1 | (news if self.rules.users > 1 else 0),
            pending2=page.pending2 | (news if self.rules.users > 2 else 0),
        )

    # The hub.

    def sync(self, page: Page) -> Page:
        """GET; what it says is handed to every user."""
        synced = self.strategy.sync(news(page), page.cache)
        page = self._hand_out(page._replace(cache=synced.cache), synced.news)
        if self.rules.ring:
            return page._replace(returned=page.kernel, kept=0)
        if not self.strategy.manual:
            page = page._replace(kernel=0, since_get=0)
        return page

    def older(self, page: Page) -> Page:
        """Its entry in the ring is reset, because one that came later is."""
        if not page.kernel:
            return page
        return page._replace(kernel=0, returned=0, kept=page.kept | (1 - page.returned), early=1)

    def full(self, page: Page) -> Page:
        """The ring is full: its vCPU's thread resets everything."""
        page = self.flush(page)
        after = self.older(page)
        return after._replace(kept=page.kept) if self.rules.broken is Broken.FULL_FORGETS else after

    def _cleared(self, page: Page, clear: int) -> Page:
        if not (page.kernel & clear):
            return page
        return page._replace(kernel=0, returned=0, kept=page.kept | int(self.rules.ring and not page.returned))

    def take(self, page: Page) -> Page:
        """The migration takes and clears it, if it is in the range and pending."""
        if self.rules.reads_first:
            return page._replace(taken=page.pending, since_take=0, late=0) if page.pending else page
        return self._take(page)

    def _take(self, page: Page) -> Page:
        step = self.strategy.take(page.pending, page.cache, 1, exact=self.exact)
        after = self._cleared(page, step.clear)._replace(cache=step.cache, pending=0, taken=page.taken | page.pending)
        if page.pending:
            after = after._replace(since_take=page.since_get | int(page.early == 2), late=0, early=0)
        if self.rules.broken is Broken.NO_COMPENSATION:
            return after
        return after._replace(
            pending1=page.pending1 | (step.owed if self.rules.users > 1 else 0),
            pending2=page.pending2 | (step.owed if self.rules.users > 2 else 0),
        )

    def clear(self, page: Page) -> Page:
        """The migration clears what it has read (`Broken.READ_FIRST`)."""
        return self._take(page)._replace(taken=page.taken, unread=0) if page.unread else page

    def take1(self, page: Page) -> Page:
        """The display takes it."""
        step = self.strategy.take(page.pending1, page.cache, 1, exact=self.all_exact)
        return self._cleared(page, step.clear)._replace(
            cache=step.cache,
            pending=page.pending | step.owed,
            pending1=0,
            missed1=0,
            pending2=page.pending2 | (step.owed if self.rules.users > 2 else 0),
        )

    def take2(self, page: Page) -> Page:
        """The meter takes it."""
        step = self.strategy.take(page.pending2, page.cache, 1, exact=self.all_exact)
        return self._cleared(page, step.clear)._replace(
            cache=step.cache,
            pending=page.pending | step.owed,
            pending1=page.pending1 | step.owed,
            pending2=0,
            missed2=0,
        )

    # The pipeline.

    def read(self, page: Page) -> Page:
        """The migration reads what it has taken. An older copy under way is as good as placed: rounds are ordered."""
        if not page.taken:
            return page
        unread = int(self.rules.reads_first)
        return page._replace(taken=0, flying=1, since_read=0, unread=unread)

    def place(self, page: Page) -> Page:
        """The destination places it."""
        if not page.flying:
            return page
        return page._replace(flying=0, unacked=int(self.rules.failures), stale=page.since_read)

    def acknowledge(self, page: Page) -> Page:
        """The source learns that it was placed."""
        return page._replace(unacked=0)

    def lose(self, page: Page) -> Page:
        """The connection breaks: what was taken and not known to be placed is given back."""
        if not (page.taken or page.flying or page.unacked):
            return page
        after = page._replace(taken=0, flying=0, unacked=0, unread=0)
        if self.rules.broken is Broken.NO_GIVE_BACK:
            return after
        back = self.strategy.give_back(1, page.cache)
        return after._replace(cache=back.cache, pending=page.pending | back.pending, since_read=1)

    def begin(self, page: Page) -> Page:
        """A migration joins: for the first time, or anew after one that failed, to an empty destination."""
        return page._replace(
            pending=1, taken=0, flying=0, unacked=0, unread=0, stale=1, since_read=1, since_take=0, late=0
        )


def news(page: Page) -> int:
    """What GET returns: the bit, or whether the ring has, or had, an entry that no GET has returned."""
    return page.kept | (page.kernel & ~page.returned)


def plain(page: Page, rules: Rules) -> Page:
    """Forget what can make no difference any more, so that fewer states have to be searched.

    Where nothing is broken, a page that is pending or under way will be read and placed before the destination goes on,
    so what the destination holds now does not matter. Ghosts that the next take sets anew do not matter before it when
    a copy is needed anyway.
    """
    if rules.broken is None and (page.pending or page.taken or page.flying):
        page = page._replace(stale=1)
    if page.since_read and not page.taken:
        page = page._replace(since_take=0, late=0)
        if page.pending and not page.flying:
            page = page._replace(unacked=0)
    elif page.since_take:
        page = page._replace(late=0)
    return page


def copy_kind(page: Page) -> str:
    """Say what a copy would be that is sent because of a take now: nothing, needed, window, late or needless."""
    if not page.pending:
        return ""
    if page.since_read:
        return "needed"
    if page.since_take:
        return "window"
    return "late" if page.late else "needless"


def misses_a_write(page: Page) -> bool:
    """Whether the display or the meter will never hear of a write after their last take."""
    known = news(page) | page.unmarked | page.buffered
    return bool((page.missed1 & ~(page.pending1 | known)) | (page.missed2 & ~(page.pending2 | known)))
