"""What is explored: a design, who takes part, and which rule, if any, is broken on purpose."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from amig.dirty.registry import strategies
from amig.dirty.strategy import Strategy

MAX_PAGES = 3
MAX_USERS = 3
RING = "ring"
"""The KVM dirty ring: a harvest returns pages and resets their entries, which is auto-clear to users of the hub."""

DESIGNS: Final = ("auto-clear", "slot-cache", "exact", RING, "migration-bitmap", "blind")
"""All that can be searched, the safe ones first."""

USERS: Final = ("migration", "display", "meter")


class Broken(enum.StrEnum):
    """A rule of the design that is broken on purpose, to see what it is good for."""

    READ_FIRST = "read-first"
    """A page is read, and cleared afterwards (rule 1)."""
    CLEAR_FIRST = "clear-first"
    """Users begin with what the log says, and it is cleared before the first GET (rule 2)."""
    NO_COMPENSATION = "no-compensation"
    """What the exact user cleared beyond C is not owed to the others (D4)."""
    TWO_EXACT = "two-exact"
    """Every user is an exact user (D4)."""
    EARLY_RESET = "read-before-reset"
    """Pages of the ring are handed out when harvested, and their entries reset some time later (rule 7)."""
    NO_KICK = "no-kick"
    """A harvest does not get the vCPUs out of the guest: writes in a CPU's own buffer are missing (rule 7)."""
    NO_LAST_SYNC = "no-sync-after-save"
    """No GET after the device state was saved (rule 8)."""
    NO_GIVE_BACK = "no-give-back"
    """Pages that were under way when a connection broke are forgotten (rule 9)."""
    MARK_FIRST = "mark-before-write"
    """An external source marks a page and then writes it."""
    NO_QUIESCE = "marks-after-pause"
    """The last GET does not wait for marks of external sources."""


BROKEN: Final[dict[Broken, str]] = {
    Broken.READ_FIRST: "exact",
    Broken.CLEAR_FIRST: "slot-cache",
    Broken.NO_COMPENSATION: "exact",
    Broken.TWO_EXACT: "exact",
    Broken.EARLY_RESET: RING,
    Broken.NO_KICK: RING,
    Broken.NO_LAST_SYNC: "exact",
    Broken.NO_GIVE_BACK: "exact",
    Broken.MARK_FIRST: "exact",
    Broken.NO_QUIESCE: "exact",
}
"""Every rule, and a design in which it is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """One configuration of the model."""

    design: str
    users: int = 1
    """1: the migration; 2: and a display; 3: and a meter."""
    external: bool = False
    """Whether another source writes and marks."""
    failures: bool = True
    """Whether connections break, and migrations fail and begin anew."""
    saving: bool = True
    """Whether saving the device state may write memory."""
    initially_set: bool = True
    """Whether a log starts all ones; manual designs only."""
    broken: Broken | None = None

    @property
    def ring(self) -> bool:
        """Whether the kernel has a ring instead of a bitmap."""
        return self.design == RING

    @property
    def strategy(self) -> Strategy:
        """The very class that runs on KVM."""
        return strategies["auto-clear" if self.ring else self.design]()

    @property
    def ring_size(self) -> int:
        """Entries that fit: one, so that the ring is full as soon as two pages are written."""
        return 1
