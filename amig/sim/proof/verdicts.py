"""The table: every design, with so many users and such sources, and what can happen to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from amig.sim.proof.rules import BROKEN, DESIGNS, RING, Broken, Rules
from amig.sim.proof.search import LATE, LOST, MARK, MAYBE, NEEDLESS, PROPERTIES, WINDOW, Found, search

MOST_STATES = 8_000_000
"""Of one search: a few hundred bytes each while a level is worked on."""

SOURCES = ((False, False), (True, False), (False, True), (True, True))
"""(another source writes, connections break)."""


@dataclass(slots=True, kw_only=True)
class Verdict:
    """One row."""

    design: str
    users: int
    external: bool
    failures: bool
    happens: dict[str, str] = field(default_factory=dict)
    """What can happen, and with which start of the log; what is missing can't."""
    states: int = 0
    seconds: float = 0.0
    depth: int = 0
    complete: bool = True

    @property
    def sources(self) -> str:
        """Who writes, and whether things break."""
        return "guest" + ", other" * self.external + ", failures" * self.failures

    def word(self, what: str) -> str:
        """The word for the table."""
        return self.happens.get(what, "never" if self.complete else "not found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuted:
    """A rule that was broken on purpose, and what came of it."""

    broken: Broken
    found: Found
    what: str
    """One of `PROPERTIES`."""


def verdicts(
    designs: Sequence[str] = DESIGNS, *, pages: int = 2, users: int = 2, depth: int = 1000, most: int = MOST_STATES
) -> Iterator[Verdict]:
    """Search all configurations of some designs, the simple ones first."""
    for design in designs:
        for number in range(1, users + 1):
            for external, failures in SOURCES:
                rules = Rules(design=design, users=number, external=external, failures=failures)
                yield judge(rules, pages, depth, most)


def judge(rules: Rules, pages: int, depth: int, most: int) -> Verdict:
    """Search a configuration with every start of the log that it can have."""
    verdict = Verdict(design=rules.design, users=rules.users, external=rules.external, failures=rules.failures)
    starts = rules.starts
    every = [search(replace(rules, initially_set=first), pages=pages, depth=depth, most=most) for first in starts]
    for what in (*PROPERTIES, WINDOW, LATE, MAYBE):
        having = [found.rules.initially_set for found in every if what in found.traces]
        if len(having) == len(starts):
            verdict.happens[what] = "yes"
        elif having:
            verdict.happens[what] = "log starts set" if having[0] else "log starts clear"
    verdict.states = sum(found.states for found in every)
    verdict.seconds = sum(found.seconds for found in every)
    verdict.depth = max(found.depth for found in every)
    verdict.complete = all(found.complete for found in every)
    return verdict


def window_of(design: str) -> str:
    """From when to when a write makes a page go twice."""
    if design == RING:
        return "reset to read"
    return "GET to read" if design == "auto-clear" else "take to read"


def shortest(verdict: Verdict, what: str, *, pages: int = 2) -> Found:
    """Search a configuration in which ``what`` happens for the shortest way to it, with as few pages as show it.

    Ways in which the guest writes are preferred to those in which saving the device state does.
    """
    happens = verdict.happens[what]
    first = happens != "log starts clear"
    for saving in (False, True):
        rules = Rules(
            design=verdict.design,
            users=verdict.users,
            external=verdict.external,
            failures=verdict.failures,
            saving=saving,
            initially_set=first,
        )
        for count in range(1, pages + 1):
            found = search(rules, pages=count, stop=frozenset({what}))
            if what in found.traces:
                return found
    raise LookupError(f"{what} does not happen with {pages} pages")


def refute(broken: Broken) -> Refuted:
    """Break a rule and return the shortest way to the worst harm, in the plainest configuration that shows any."""
    design = BROKEN[broken]
    harms = PROPERTIES if design == "exact" else (LOST, MARK)  # others copy needlessly with all rules kept
    for saving, users, (external, failures) in product((False, True), (1, 2), SOURCES):
        rules = Rules(design=design, users=users, external=external, failures=failures, saving=saving, broken=broken)
        found = search(rules, pages=1)
        for what in sorted(harms, key=(LOST, MARK, NEEDLESS).index):
            if what in found.traces:
                return Refuted(broken=broken, found=found, what=what)
    raise LookupError(f"breaking {broken} does no harm")
