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
"""The KVM dirty ring."""

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
    READ_BEFORE_RESET = "read-before-reset"
    """A page that the ring named is read, and its entry reset afterwards (rule 7)."""
    NO_KICK = "no-kick"
    """The last harvest does not wait for vCPUs to have left the guest: a CPU's own buffer is missing (rule 7)."""
    FULL_FORGETS = "full-ring-forgets"
    """A full ring is reset by its vCPU's thread, which does not keep what its entries named."""
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
    Broken.READ_BEFORE_RESET: RING,
    Broken.NO_KICK: RING,
    Broken.FULL_FORGETS: RING,
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
    def buffers(self) -> bool:
        """Whether CPUs log by themselves first (Intel's PML): not where another source writes, to end in time."""
        return self.ring and not self.external

    @property
    def reads_first(self) -> bool:
        """Whether pages are read before they are cleared."""
        return self.broken in (Broken.READ_FIRST, Broken.READ_BEFORE_RESET)

    @property
    def strategy(self) -> Strategy:
        """The very class that runs on KVM."""
        return strategies[self.design]()

    @property
    def starts(self) -> tuple[bool, ...]:
        """What ``initially_set`` can be."""
        return (True, False) if self.strategy.manual and not self.ring else (False,)

    @property
    def ring_size(self) -> int:
        """Entries that fit: one, so that the ring is full as soon as two pages are written."""
        return 1
