"""Who may do what when: the model's moves, each of them one atomic step, and the phases of a migration."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from amig.sim.proof.page import Page, Steps
from amig.sim.proof.rules import USERS, Broken, Rules


class Phase(enum.IntEnum):
    """Where the migration is; everything else goes on around it."""

    ALONE = 0
    """The display uses the log; no migration yet."""
    RUN = 1
    """Precopy."""
    PAUSED = 2
    """The guest is paused; the last GET comes next."""
    FINAL = 3
    """What that GET left pending is sent."""
    SAVED = 4
    """The device state was saved, which may have written memory; a GET comes next."""
    LATE = 5
    """What saving wrote is sent."""
    DONE = 6
    """The destination runs."""


class Guard(enum.Enum):
    """What must hold for a move, besides the phase; of all pages, or of those that it concerns."""

    NONE = enum.auto()
    SOME_PENDING = enum.auto()
    """Something of the range is pending, and nothing of it is taken and unread: as the pipeline plans its extents."""
    SOME_READ = enum.auto()
    """Something of the range was read and is to be cleared."""
    RING_HAS_ROOM = enum.auto()
    """An entry for the page is there or fits: else the vCPU is out of the guest, with a full ring."""
    RING_FULL = enum.auto()
    NO_MARK_DUE = enum.auto()
    ALL_PLACED = enum.auto()
    """Nothing pending, taken or flying: what was planned has been placed."""


@dataclass(frozen=True, slots=True)
class Move:
    """One atomic step."""

    actor: str
    text: str
    """With ``{}`` for the pages."""
    step: str
    """Method of `Steps`, applied to each of ``pages``; empty: nothing happens to pages."""
    pages: tuple[int, ...]
    before: Phase
    after: Phase
    guard: Guard = Guard.NONE
    older: tuple[int, ...] = ()
    """Pages of older entries of the ring, which are reset with those of ``pages``."""

    def told(self) -> str:
        """Say what happens."""
        too = f", {name_pages(self.older)} protected too" if self.older else ""
        return self.text.format(name_pages(self.pages or (0,))) + too


def name_pages(pages: Sequence[int]) -> str:
    """Name pages in a sentence."""
    return f"page {pages[0]}" if len(pages) == 1 else "pages " + " and ".join(map(str, pages))


GUEST, OTHER, DEST, LINK, VCPU = "guest", "other source", "destination", "link", "vCPU"
MIGRATION, DISPLAY, METER = USERS


def ranges(pages: int) -> list[tuple[int, ...]]:
    """Return the ranges that a user may take: each page, each pair, all."""
    return [some for size in range(1, pages + 1) for some in combinations(range(pages), size)]


def moves(rules: Rules, pages: int) -> list[Move]:
    """Return every move of a configuration, in the order in which traces prefer them."""
    return list(_moves(rules, pages))


def _moves(rules: Rules, pages: int) -> Iterator[Move]:
    everything = tuple(range(pages))
    for phase in (Phase.RUN, Phase.FINAL, Phase.LATE):
        yield from _pipeline(rules, pages, phase)
    for phase in (Phase.ALONE, Phase.RUN) if rules.users > 1 else (Phase.RUN,):
        yield from _writers(rules, pages, phase)
    yield Move(MIGRATION, "GET: news for every user", "sync", everything, Phase.RUN, Phase.RUN)
    for phase in Phase:
        if phase is not Phase.DONE and rules.users > 1:
            if phase is not Phase.RUN:
                yield Move(DISPLAY, "GET: news for every user", "sync", everything, phase, phase)
            for user, name in enumerate(USERS[1 : rules.users], 1):
                for some in ranges(pages):
                    for older in _older(rules, pages, some):
                        yield Move(name, "takes and clears {}", f"take{user}", some, phase, phase, older=older)
        if rules.buffers and (phase in (Phase.ALONE, Phase.RUN) or rules.broken is Broken.NO_KICK):
            yield Move(VCPU, "leaves: its buffer goes to the ring", "flush", everything, phase, phase)
    if rules.users > 1:
        yield Move(MIGRATION, "joins: everything pending", "begin", everything, Phase.ALONE, Phase.RUN)
    if rules.failures:
        yield Move(LINK, "breaks: bits are given back", "lose", everything, Phase.RUN, Phase.RUN)
        yield Move(MIGRATION, "fails, and begins anew", "begin", everything, Phase.RUN, Phase.RUN)
    yield from _switchover(rules, pages)


def _pipeline(rules: Rules, pages: int, phase: Phase) -> Iterator[Move]:
    take = "takes {} to read first" if rules.reads_first else "takes and clears {}"
    for some in ranges(pages):
        for older in _older(rules, pages, some):
            yield Move(MIGRATION, take, "take", some, phase, phase, Guard.SOME_PENDING, older)
        if rules.reads_first:
            yield Move(MIGRATION, "clears {}", "clear", some, phase, phase, Guard.SOME_READ)
    for page in range(pages):
        yield Move(MIGRATION, "reads {} and sends it", "read", (page,), phase, phase)
        yield Move(DEST, "places {}", "place", (page,), phase, phase)
        if rules.failures and phase is Phase.RUN:
            yield Move(DEST, "acknowledges {}", "acknowledge", (page,), phase, phase)


def _older(rules: Rules, pages: int, some: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the sets of other pages that a clear may reset with its own: which are older is not modelled, so any."""
    others = [page for page in range(pages) if page not in some] if rules.ring else []
    for size in range(len(others) + 1):
        yield from combinations(others, size)


def _writers(rules: Rules, pages: int, phase: Phase) -> Iterator[Move]:
    room = Guard.RING_HAS_ROOM if rules.ring else Guard.NONE
    for page in range(pages):
        yield Move(GUEST, "writes {}", "write", (page,), phase, phase, room)
        if rules.external:
            yield Move(OTHER, "writes {}", "external_write", (page,), phase, phase)
            yield Move(OTHER, "marks {}", "external_mark", (page,), phase, phase)
    if rules.ring:
        yield Move(
            VCPU, "finds the ring full and resets it", "full", tuple(range(pages)), phase, phase, Guard.RING_FULL
        )


def _switchover(rules: Rules, pages: int) -> Iterator[Move]:
    everything = tuple(range(pages))
    no_quiesce = rules.broken is Broken.NO_QUIESCE
    quiet = Guard.NONE if no_quiesce else Guard.NO_MARK_DUE
    leave = "flush" if rules.buffers and rules.broken is not Broken.NO_KICK else ""
    yield Move(MIGRATION, "pauses the guest", leave, everything if leave else (), Phase.RUN, Phase.PAUSED, quiet)
    if no_quiesce:
        for phase in (Phase.PAUSED, Phase.FINAL, Phase.SAVED, Phase.LATE):
            for page in everything:
                yield Move(OTHER, "marks {}", "external_mark", (page,), phase, phase)
    yield Move(MIGRATION, "GET: news for every user", "sync", everything, Phase.PAUSED, Phase.FINAL)
    yield Move(MIGRATION, "saves the device state", "", (), Phase.FINAL, Phase.SAVED, Guard.ALL_PLACED)
    for page in everything if rules.saving else ():
        yield Move(
            MIGRATION, "saves the device state, which writes {}", "host_write", (page,), Phase.FINAL, Phase.SAVED,
            Guard.ALL_PLACED,
        )  # fmt: skip
    if rules.broken is Broken.NO_LAST_SYNC:
        yield Move(DEST, "goes on with the guest", "", (), Phase.SAVED, Phase.DONE, Guard.ALL_PLACED)
    yield Move(MIGRATION, "GET: news for every user", "sync", everything, Phase.SAVED, Phase.LATE)
    yield Move(DEST, "goes on with the guest", "", (), Phase.LATE, Phase.DONE, Guard.ALL_PLACED)


def allowed(move: Move, pages: tuple[Page, ...], rules: Rules) -> bool:
    """Whether the guard of a move holds."""
    here = [pages[i] for i in move.pages]
    match move.guard:
        case Guard.SOME_PENDING:
            return any(p.pending for p in here) and not any(p.taken or p.unread for p in here)
        case Guard.SOME_READ:
            return any(p.unread for p in here)
        case Guard.RING_HAS_ROOM:
            return bool(here[0].kernel or here[0].buffered) or _entries(pages) < rules.ring_size
        case Guard.RING_FULL:
            return _entries(pages) >= rules.ring_size
        case Guard.NO_MARK_DUE:
            return not any(p.unmarked for p in pages)
        case Guard.ALL_PLACED:
            return not any(p.pending or p.taken or p.unread or p.flying for p in pages)
        case _:
            return True


def apply(move: Move, pages: tuple[Page, ...], steps: Steps) -> tuple[Page, ...]:
    """Return the pages after a move."""
    if not move.step:
        return pages
    step = getattr(steps, move.step)
    return tuple(
        step(page) if i in move.pages else steps.older(page) if i in move.older else page
        for i, page in enumerate(pages)
    )


def _entries(pages: tuple[Page, ...]) -> int:
    return sum(p.kernel or p.buffered for p in pages)
