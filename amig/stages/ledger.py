"""What is in flight: bits that were taken from the dirty log and not yet placed on the other side (design rule 9)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import numpy as np

from amig import bitmap
from amig.errors import PeerError
from amig.memory import WORD_PAGES, Region, Words
from amig.stages.resumption import Answer, PagesByRegion


class Ledger:
    """Keeps, by round, every page that was taken; a round leaves it when the peer says that it is placed.

    A failed migration asks `in_flight` for what must go back into the guest's pending bits. Also remembers which pages
    were ever taken, which tells pages sent more than once.
    """

    def __init__(self, regions: Iterable[Region]) -> None:
        self._regions = {region.id: region for region in regions}
        self._ever: dict[int, Words] = {region.id: bitmap.zeros(region.pages) for region in self._regions.values()}
        self._open: dict[int, dict[int, Words]] = {}
        self._taken: set[int] = set()
        self._placed = -1
        self._since = 0
        self._heard: dict[int, Words] = {}
        self._changed = asyncio.Event()

    def take(self, round_: int, region: int, first: int, words: Words) -> int:
        """Note pages as in flight; returns how many of them had been taken in an earlier round."""
        rounds = self._open.setdefault(round_, {})
        flight = rounds.get(region)
        if flight is None:
            flight = rounds[region] = bitmap.zeros(self._regions[region].pages)
        at = slice(first // WORD_PAGES, first // WORD_PAGES + len(words))
        flight[at] |= words
        ever = self._ever[region][at]
        again = bitmap.count(ever & words)
        np.bitwise_or(ever, words, out=ever)
        return again

    def all_taken(self, round_: int) -> None:
        """Every extent of the round has been taken: the next sync will not find them again."""
        self._taken.add(round_)
        self._notify()

    def placed(self, round_: int) -> None:
        """The peer has placed this round and all before it; raises `PeerError` for one that it can't have yet."""
        if round_ not in self._taken:
            raise PeerError(f"the peer says that it has placed all of round {round_}, which was not sent")
        for done in [r for r in self._open if r <= round_]:
            del self._open[done]
        self._placed = max(self._placed, round_)
        self._notify()

    def in_flight(self) -> Mapping[int, Words]:
        """Return the pages taken and not placed, by region."""
        lost: dict[int, Words] = {}
        for regions in self._open.values():
            for region, words in regions.items():
                lost[region] = lost[region] | words if region in lost else words.copy()
        return lost

    @property
    def since(self) -> int:
        """The round with which this began, or went on after the last `resume`."""
        return self._since

    def resume(self, answer: Answer, round_: int, *, first_pass: bool) -> PagesByRegion:
        """The connection was lost, and the destination has said what it has; rounds go on with ``round_``.

        Returns the pages in flight that it does not have: they must be sent again. ``first_pass``: the first pass over
        memory is not over. Raises `PeerError` for an answer that can't be.
        """
        last = answer.rounds - 1
        if last < self._placed or (answer.rounds != self._since and last not in self._taken):
            raise PeerError(f"the peer says that it has placed all rounds before round {answer.rounds}")
        flight = self._open.get(answer.rounds, {})
        for region, held in answer.held.items():
            mine = flight.get(region)
            if bitmap.any_set(held if mine is None else held & ~mine):
                raise PeerError(f"the peer says that it has pages of round {answer.rounds} that were not sent")
        for done in [r for r in self._open if r <= last]:
            del self._open[done]
        for region, held in answer.held.items():
            if region in flight:
                flight[region] &= ~held
            self._heard[region] = self._heard[region] | held if region in self._heard else held.copy()
        missing = self.in_flight()
        if first_pass:  # what was not heard of was never there: neither sent before, nor to be overwritten
            for region, words in missing.items():
                self._ever[region] &= ~words | self._heard.get(region, np.uint64(0))
        self._open.clear()
        self._taken.clear()
        self._since = round_
        self._placed = round_ - 1
        self._notify()
        return missing

    @property
    def known(self) -> PagesByRegion:
        """Pages of which the destination may have content, when nothing is in flight."""
        return self._ever

    async def wait_taken(self, round_: int) -> None:
        """Wait until every extent of the round has been taken."""
        while round_ not in self._taken:
            await self._changed.wait()

    async def wait_placed(self, round_: int) -> None:
        """Wait until the peer has placed the round."""
        while self._placed < round_:
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
