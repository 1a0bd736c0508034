"""Who is owed which pages: the cache C and every user's pending bits, by region, moved on by the strategy's functions.

Knows no ioctl and no lock; `amig.dirty.hub.DirtyLogHub` has both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from amig import bitmap
from amig.dirty.layout import Layout, start
from amig.dirty.strategy import Strategy
from amig.memory import WORD_PAGES, Slot, Words

BLOCK_WORDS = 32768
"""Words that `Ledger.got` works on at a time: small enough to stay in a core's cache."""


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """What one user is owed."""

    name: str
    exact: bool
    pending: dict[int, Words]
    snapshot: dict[int, Words] = field(default_factory=dict)
    """Buffers for copies of ``pending``, made when first needed."""
    possible: dict[int, Words] | None = None
    """Of the pending bits those that nothing is known to have written: pending from the start on, or owed. None: not
    told apart."""
    taken: int = 0
    """Pages, in total."""

    @property
    def pages(self) -> int:
        """Pages pending."""
        return sum(map(bitmap.count, self.pending.values()))

    def make_snapshot(self) -> dict[int, Words]:
        """Return ``snapshot`` with one buffer for each region, of the right size."""
        old, self.snapshot = self.snapshot, {}
        for region, words in self.pending.items():
            buffer = old.get(region)
            self.snapshot[region] = buffer if buffer is not None and buffer.size == words.size else np.empty_like(words)
        return dict(self.snapshot)


class Ledger:
    """The bitmaps of one log from the time it is switched on."""

    def __init__(self, strategy: Strategy, layout: Layout) -> None:
        self.strategy = strategy
        self.layout = layout
        self.accounts: list[Account] = []
        self._cache = {region: bitmap.zeros(pages) for region, pages in layout.pages.items()}
        self._buffers()

    def join(self, name: str, *, exact: bool, apart: bool = False) -> Account:
        """Add a user, for whom all pages are pending; ``apart``: know which of them are only possibly dirty."""
        pending = {region: bitmap.ones(pages) for region, pages in self.layout.pages.items()}
        possible = {region: words.copy() for region, words in pending.items()} if apart else None
        account = Account(name=name, exact=exact, pending=pending, possible=possible)
        self.accounts.append(account)
        return account

    def raw(self, slot: Slot) -> Words:
        """Return the buffer for the slot's bitmap, to be filled by GET and then given to `got`."""
        return self._raw[: bitmap.words_for(slot.pages)]

    def got(self, slot: Slot, raw: Words) -> None:
        """Hand what GET returned for a slot to the cache and to every user."""
        low, shift = divmod(start(slot), WORD_PAGES)
        if shift:
            fresh = bitmap.spread(raw, shift, slot.pages, self._shifted[: bitmap.words_for(shift + slot.pages)])
        else:
            fresh = raw
            fresh[-1] &= bitmap.tail_mask(slot.pages)
        cache = self._cache[slot.region]
        for begin in range(0, fresh.size, BLOCK_WORDS):
            part = fresh[begin : begin + BLOCK_WORDS]
            if not part.any():
                continue
            here = slice(low + begin, low + begin + part.size)
            synced = self.strategy.sync(part, cache[here])
            cache[here] = synced.cache
            for account in self.accounts:
                account.pending[slot.region][here] |= synced.news
                if account.possible is not None:
                    account.possible[slot.region][here] &= ~synced.news

    def take(
        self, account: Account, region: int, first: int, count: int, clear: Callable[[Words], None]
    ) -> tuple[Words, Words | None]:
        """Take a user's pending bits of a range; ``clear`` is called with what CLEAR gets.

        Returns the bits, and which of them are only possibly dirty (None where that is not told apart). An error of
        ``clear`` leaves them pending.
        """
        mine = bitmap.extract(account.pending[region], first, count)
        cached = bitmap.extract(self._cache[region], first, count)
        step = self.strategy.take(mine, cached, bitmap.ones(count), exact=account.exact)
        try:
            clear(step.clear)
        finally:
            # Also after an error: some slots may have been cleared, so C must not name the bits any more, and what is
            # owed is owed.
            bitmap.store(self._cache[region], first, step.cache, count)
            if len(self.accounts) > 1 and step.owed.any():
                for other in self.accounts:
                    if other is not account:
                        self._owe(other, region, first, step.owed, count)
        bitmap.remove_from(account.pending[region], first, mine, count)
        account.taken += bitmap.count(mine)
        if account.possible is None:
            return mine, None
        possible = mine & bitmap.extract(account.possible[region], first, count)
        bitmap.remove_from(account.possible[region], first, mine, count)
        return mine, possible

    def _owe(self, account: Account, region: int, first: int, owed: Words, count: int) -> None:
        if account.possible is not None:
            news = owed & ~bitmap.extract(account.pending[region], first, count)
            bitmap.or_into(account.possible[region], first, news, count)
        bitmap.or_into(account.pending[region], first, owed, count)

    def give_back(self, account: Account, region: int, first: int, taken: Words) -> None:
        """Return taken bits to a user; those past the region's end are dropped."""
        count = min(self.layout.pages.get(region, 0) - first, taken.size * WORD_PAGES)
        if count <= 0:
            return
        back = self.strategy.give_back(
            bitmap.extract(taken, 0, count), bitmap.extract(self._cache[region], first, count)
        )
        bitmap.store(self._cache[region], first, back.cache, count)
        bitmap.or_into(account.pending[region], first, back.pending, count)

    def mark(self, region: int, first: int, count: int) -> None:
        """Make pages pending for every user; the kernel does not know of them."""
        for account in self.accounts:
            bitmap.set_range(account.pending[region], first, count)
            if account.possible is not None:
                bitmap.clear_range(account.possible[region], first, count)

    def mark_bits(self, region: int, first: int, news: Words, count: int) -> None:
        """As `mark`, for the pages of a range that are set in ``news``."""
        for account in self.accounts:
            bitmap.or_into(account.pending[region], first, news, count)
            if account.possible is not None:
                bitmap.remove_from(account.possible[region], first, news, count)

    def forget(self, slot: Slot) -> None:
        """Take nothing about a slot's pages for granted: all pending, none known to be set in the kernel."""
        pages = min(slot.pages, self.layout.pages.get(slot.region, 0) - start(slot))
        if pages > 0:
            bitmap.clear_range(self._cache[slot.region], start(slot), pages)
            for account in self.accounts:
                self._owe(account, slot.region, start(slot), bitmap.ones(pages), pages)

    def move_to(self, layout: Layout) -> None:
        """Go over to another memory map: pages of slots that came or went are forgotten."""
        old, self.layout = self.layout, layout
        self._cache = self._resized(self._cache, old, fill=False)
        for account in self.accounts:
            account.pending = self._resized(account.pending, old, fill=True)
            if account.possible is not None:
                account.possible = self._resized(account.possible, old, fill=True)
        for slot in set(old.map.slots) ^ set(layout.map.slots):
            self.forget(slot)
        self._buffers()

    def _resized(self, maps: dict[int, Words], old: Layout, *, fill: bool) -> dict[int, Words]:
        result: dict[int, Words] = {}
        for region, pages in self.layout.pages.items():
            before = old.pages.get(region, 0)
            if before == pages:
                result[region] = maps[region]
                continue
            words = bitmap.ones(pages) if fill else bitmap.zeros(pages)
            if before:
                bitmap.store(words, 0, maps[region], min(before, pages))
            result[region] = words
        return result

    def _buffers(self) -> None:
        """Make room for the largest slot's bitmap, and for a shifted copy where a slot needs one."""
        size = max(slot.pages for slot in self.layout.map.slots) // WORD_PAGES + 2
        shifted = any(start(slot) % WORD_PAGES for slot in self.layout.map.slots)
        self._raw: Words = np.empty(size, dtype=np.uint64)
        self._shifted: Words = np.empty(size if shifted else 0, dtype=np.uint64)
