"""What outlives a connection: where the source goes on, and what the destination has in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from amig import bitmap
from amig.errors import PeerError
from amig.memory import Region, Words

PagesByRegion = Mapping[int, Words]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where the source's pipeline begins: with the first round, or with a new one after a lost connection."""

    began: float
    """Monotonic time at which the migration began: time limits count from there."""
    round: int = 0
    """Its first round; never a number that was used before."""
    sparse: bool = True
    """Whether a first pass over memory is not over: holes need not be read then."""
    known: PagesByRegion = field(default_factory=dict)
    """Pages of which the destination may have content: one that is a hole now has to be sent as zero all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the destination has, as it said when the source came back."""

    rounds: int
    """Every page of the rounds before this one is in place."""
    held: PagesByRegion
    """Pages in place of that round."""


class Placement:
    """What the destination has in place: which pages hold something, how far it is, what of the round under way came.

    With ``remember`` the last is kept page by page, so that a source that lost its connection hears of it. The answer
    may be lost as well: the one before is kept until the source shows that it has heard the new one.
    """

    def __init__(self, regions: Iterable[Region], *, remember: bool = False) -> None:
        self._pages = {region.id: region.pages for region in regions}
        self.content: Mapping[int, Words] = self._zeros()
        """Pages in which something was placed that is not zero."""
        self.rounds = 0
        """Number of the round under way."""
        self.current = self._zeros() if remember else None
        """Pages of it that are in place; None: nobody will ask."""
        self._start = 0
        self._before: tuple[int, Answer] | None = None

    def end_round(self, round_: int) -> None:
        """All of a round is in place."""
        self.rounds = round_ + 1
        if self.current is not None:
            for words in self.current.values():
                words.fill(0)

    def answer(self, since: int) -> Answer:
        """Return what a source is to be told that heard the answer before it began with round ``since``.

        Raises `PeerError` when no such source can be.
        """
        if since == self._start and self.current is not None:
            return Answer(rounds=self.rounds, held=self.current)
        unheard = self.rounds == self._start and not any(
            bitmap.any_set(words) for words in (self.current or {}).values()
        )
        if self._before is None or since != self._before[0] or not unheard:
            raise PeerError(f"the source says that it began with round {since}; here it began with round {self._start}")
        return self._before[1]

    def check(self, since: int, round_: int) -> Answer:
        """Return the answer to a source that heard the one before ``since`` and wants to go on with ``round_``.

        Changes nothing. Raises `PeerError` when no such source can be, or the number was used.
        """
        answer = self.answer(since)
        if round_ <= max(answer.rounds, since):
            raise PeerError(f"the source wants to go on with round {round_}, which it has used")
        return answer

    def go_on(self, since: int, round_: int) -> Answer:
        """Expect ``round_`` next; returns what the source is to be told. Raises what `check` raises."""
        told = self.check(since, round_)
        self._before = since, told
        self._start = self.rounds = round_
        self.current = self._zeros()
        return told

    def _zeros(self) -> dict[int, Words]:
        return {region: bitmap.zeros(pages) for region, pages in self._pages.items()}
