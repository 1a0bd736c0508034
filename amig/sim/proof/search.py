"""The search: every state that any interleaving can lead to, breadth first, so that the first find is the shortest.

States are rows of page numbers (indexes into a table of page states) and a phase; pages are interchangeable, so rows
are kept sorted. A step is a lookup, and a whole level of the search is worked on at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from amig.sim.proof.moves import Guard, Move, Phase, allowed, apply, moves
from amig.sim.proof.page import Page, Steps, copy_kind, misses_a_write, plain, start, without_migration
from amig.sim.proof.rules import Rules

LOST, NEEDLESS, MARK, WINDOW, LATE, MAYBE = "lost page", "needless copy", "lost mark", "window", "late mark", "maybe"
PROPERTIES = (LOST, NEEDLESS, MARK)
"""What a design must never do. The others are counted apart."""

Keys = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A step of a trace: the move, and what followed."""

    move: Move
    pages: tuple[Page, ...]


@dataclass(slots=True, kw_only=True)
class Found:
    """What a search has found."""

    rules: Rules
    pages: int
    states: int = 0
    depth: int = 0
    """Levels explored; the longest of all shortest ways."""
    complete: bool = False
    """Whether every reachable state was seen."""
    seconds: float = 0.0
    traces: dict[str, list[Moment]] = field(default_factory=dict)
    """The shortest way to each thing that can happen, by property; what is missing can't happen."""
    start: tuple[Page, ...] = ()


class _Tables:
    """Page states by number, and every step as an array of numbers."""

    def __init__(self, rules: Rules, every: list[Move], first: list[Page]) -> None:
        steps = Steps(rules)
        names = sorted({move.step for move in every if move.step} | {"older"})
        functions: list[Callable[[Page], Page]] = [getattr(steps, name) for name in names]
        self.rules = rules
        self._numbers: dict[Page, int] = {}
        self.pages: list[Page] = []
        for page in first:
            self.number(page)
        # self.pages grows while we go, until all that can be reached is there.
        results = [[self.number(function(page)) for function in functions] for page in self.pages]
        table = np.array(results, np.int32)
        self.steps = {name: np.ascontiguousarray(table[:, i]) for i, name in enumerate(names)}
        kinds = [copy_kind(page) for page in self.pages]
        self.copies = {name: np.array([kind == name for kind in kinds]) for name in ("needless", "window", "late")}
        self.misses = self._where(misses_a_write)
        self.maybe = [
            self._where(lambda p: bool(p.pending1 and not p.missed1)),
            self._where(lambda p: bool(p.pending2 and not p.missed2)),
        ]
        self.stale = self._where(lambda p: bool(p.stale))
        self.pending = self._where(lambda p: bool(p.pending))
        self.unread = self._where(lambda p: bool(p.unread))
        self.held = self._where(lambda p: bool(p.taken or p.unread))
        self.busy = self._where(lambda p: bool(p.pending or p.taken or p.unread or p.flying))
        self.unmarked = self._where(lambda p: bool(p.unmarked))
        self.entry = self._where(lambda p: bool(p.kernel or p.buffered))

    def number(self, page: Page) -> int:
        """Return the number of a page's state, or of another that can't be told from it."""
        page = plain(page, self.rules)
        number = self._numbers.setdefault(page, len(self.pages))
        if number == len(self.pages):
            self.pages.append(page)
        return number

    def _where(self, test: Callable[[Page], bool]) -> Mask:
        return np.array([test(page) for page in self.pages])

    def allowed(self, move: Move, rows: Rows, ring: int) -> Mask | None:
        """Which rows a move is allowed in; None: all."""
        here = rows[:, list(move.pages)]
        match move.guard:
            case Guard.SOME_PENDING:
                mask = self.pending[here].any(axis=1) & ~self.held[here].any(axis=1)
            case Guard.SOME_READ:
                mask = self.unread[here].any(axis=1)
            case Guard.RING_HAS_ROOM:
                mask = self.entry[here[:, 0]] | (self.entry[rows].sum(axis=1) < ring)
            case Guard.RING_FULL:
                mask = self.entry[rows].sum(axis=1) >= ring
            case Guard.NO_MARK_DUE:
                mask = ~self.unmarked[rows].any(axis=1)
            case Guard.ALL_PLACED:
                mask = ~self.busy[rows].any(axis=1)
            case _:
                return None
        return np.asarray(mask, np.bool_)

    def events(self, move: Move, rows: Rows) -> dict[str, Mask]:
        """What a move does that is to be told, by row."""
        here = rows[:, list(move.pages)]
        if move.step == "take":
            return {
                what: _any(self.copies[kind][here])
                for what, kind in ((NEEDLESS, "needless"), (WINDOW, "window"), (LATE, "late"))
            }
        if move.step in ("take1", "take2"):
            return {MAYBE: _any(self.maybe[int(move.step[-1]) - 1][here])}
        if move.after is Phase.DONE:
            return {LOST: _any(self.stale[rows])}
        return {}


def _any(mask: Mask) -> Mask:
    return np.asarray(mask.any(axis=1), np.bool_)


class _Search:
    def __init__(self, rules: Rules, pages: int) -> None:
        self.rules, self.count = rules, pages
        self.every = moves(rules, pages)
        page = start(rules)
        self.first = page
        firsts = [page] + ([without_migration(page)] if rules.users > 1 else [])
        self.tables = _Tables(rules, self.every, firsts)
        self.base = len(self.tables.pages)
        self.levels: list[Keys] = []
        self.origins: list[npt.NDArray[np.int64]] = []
        """For each state of a level, the index of a state of the level before."""
        self.hits: dict[str, tuple[int, int, Move | None]] = {}
        """By property: level, index there, and the move from there that does it."""

    def key(self, phase: int, rows: Rows) -> Keys:
        keys = np.full(len(rows), phase, np.int64)
        for column in range(self.count):
            keys *= self.base
            keys += rows[:, column]
        return keys

    def rows(self, keys: Keys) -> tuple[Keys, Rows]:
        rows = np.empty((len(keys), self.count), np.int32)
        rest = keys
        for column in reversed(range(self.count)):
            rest, rows[:, column] = np.divmod(rest, self.base)
        return rest, rows

    def initial(self) -> Keys:
        number = self.tables.number
        rows = np.full((1, self.count), number(self.first), np.int32)
        keys = [self.key(Phase.RUN, rows)]
        if self.rules.users > 1:
            rows = np.full((1, self.count), number(without_migration(self.first)), np.int32)
            keys.append(self.key(Phase.ALONE, rows))
        return np.sort(np.concatenate(keys))

    def run(self, depth: int, most: int, stop: frozenset[str]) -> tuple[int, bool]:
        """Explore; returns the number of states seen, and whether they are all."""
        seen = self.initial()
        self.levels.append(seen)
        self.origins.append(np.full(len(seen), -1, np.int64))
        while len(self.levels) <= depth and len(seen) < most:
            if stop and stop <= set(self.hits):
                return len(seen), False
            keys, origins = self.expand(self.levels[-1])
            keys, chosen = np.unique(keys, return_index=True)
            origins = origins[chosen]
            where = np.searchsorted(seen, keys)
            where[where == len(seen)] = 0
            new = seen[where] != keys
            keys, origins = keys[new], origins[new]
            if not len(keys):
                return len(seen), True
            self.levels.append(keys)
            self.origins.append(origins)
            seen = np.concatenate([seen, keys])
            seen.sort(kind="stable")
        return len(seen), False

    def expand(self, level: Keys) -> tuple[Keys, npt.NDArray[np.int64]]:
        phases, rows = self.rows(level)
        self.look_at_states(rows)
        all_keys: list[Keys] = [np.empty(0, np.int64)]
        all_origins: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
        by_phase = {phase: np.flatnonzero(phases == phase) for phase in Phase}
        rows_of = {phase: rows[index] for phase, index in by_phase.items()}
        for move in self.every:
            index, here = by_phase[move.before], rows_of[move.before]
            if not len(index):
                continue
            mask = self.tables.allowed(move, here, self.rules.ring_size)
            if mask is not None:
                index, here = index[mask], here[mask]
                if not len(index):
                    continue
            for what, hit in self.tables.events(move, here).items():
                if what not in self.hits and hit.any():
                    self.hits[what] = (len(self.levels) - 1, int(index[int(hit.argmax())]), move)
            if move.after is Phase.DONE:
                continue
            after = here
            if move.step:
                after = here.copy()
                columns = list(move.pages)
                after[:, columns] = self.tables.steps[move.step][here[:, columns]]
                if move.older:
                    columns = list(move.older)
                    after[:, columns] = self.tables.steps["older"][here[:, columns]]
                after.sort(axis=1)
            keys = self.key(move.after, after)
            moved = keys != level[index]
            all_keys.append(keys[moved])
            all_origins.append(index[moved])
        return np.concatenate(all_keys), np.concatenate(all_origins)

    def look_at_states(self, rows: Rows) -> None:
        if MARK not in self.hits:
            missed = self.tables.misses[rows].any(axis=1)
            if missed.any():
                self.hits[MARK] = (len(self.levels) - 1, int(missed.argmax()), None)

    # Traces.

    def trace(self, what: str) -> list[Moment]:
        """Return the shortest way to an event: the states are known but for the order of pages; find the moves."""
        level, index, last = self.hits[what]
        way: list[int] = []
        for depth in range(level, -1, -1):
            way.append(int(self.levels[depth][index]))
            index = int(self.origins[depth][index])
        way.reverse()
        at = Phase(int(self.rows(np.array(way[:1]))[0][0]))
        here = (without_migration(self.first) if at is Phase.ALONE else self.first,) * self.count
        steps = Steps(self.rules)
        moments: list[Moment] = []
        if at is Phase.ALONE:
            opened = Move("display", "switches the log on", "", (), at, at)
            moments.append(Moment(move=opened, pages=here))
        for key in way[1:]:
            move, here = self._step(here, at, key, steps)
            at = move.after
            moments.append(Moment(move=move, pages=here))
        if last is not None:
            move = self._last(last, what, here, at)
            moments.append(Moment(move=move, pages=apply(move, here, steps)))
        return moments

    def _step(self, here: tuple[Page, ...], at: Phase, key: int, steps: Steps) -> tuple[Move, tuple[Page, ...]]:
        for move in self.every:
            if move.before is at and allowed(move, here, self.rules):
                after = apply(move, here, steps)
                if self._key_of(after, move.after) == key:
                    return move, after
        raise AssertionError("a state without a way to it")

    def _last(self, like: Move, what: str, here: tuple[Page, ...], at: Phase) -> Move:
        row = np.array([[self.tables.number(page) for page in here]], np.int32)
        for move in self.every:
            if (
                move.before is at
                and move.step == like.step
                and allowed(move, here, self.rules)
                and (mask := self.tables.events(move, row).get(what)) is not None
                and mask.any()
            ):
                return move
        raise AssertionError("an event without a move that does it")

    def _key_of(self, pages: tuple[Page, ...], phase: Phase) -> int:
        row = np.sort(np.array([[self.tables.number(page) for page in pages]], np.int32), axis=1)
        return int(self.key(phase, row)[0])


def search(
    rules: Rules, *, pages: int = 2, depth: int = 1000, most: int = 20_000_000, stop: frozenset[str] = frozenset()
) -> Found:
    """Explore a configuration.

    Ends when every reachable state was seen, after ``depth`` steps, above ``most`` states, or, with ``stop``, as soon
    as all of these properties have been refuted.
    """
    begun = time.perf_counter()
    work = _Search(rules, pages)
    states, complete = work.run(depth, most, stop)
    found = Found(rules=rules, pages=pages, states=states, depth=len(work.levels) - 1, complete=complete)
    found.traces = {what: work.trace(what) for what in work.hits}
    found.start = (work.first,) * pages
    found.seconds = time.perf_counter() - begun
    return found
