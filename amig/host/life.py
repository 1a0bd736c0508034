"""What there is to say about a hosted guest's life: who migrates it, and how it ended."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from amig.control.types import Progress
from amig.errors import AmigError
from amig.guest import Handover


class Owner(Protocol):
    """Whoever migrates a guest."""

    name: str

    def cancel_asked(self, migration: str) -> None:
        """An operator wants this migration cancelled."""


class How(enum.StrEnum):
    """How a host's guest ended."""

    POWERED_OFF = "powered-off"
    """By itself, in order."""
    STOPPED = "stopped"
    """An operator stopped it."""
    MOVED = "moved"
    """It runs elsewhere."""
    FAILED = "failed"
    """It can't go on; see ``error``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The end of a guest on this host."""

    how: How
    reason: str = ""
    error: AmigError | None = None
    handover: Handover | None = None
    """With MOVED: where it went."""


@dataclass(slots=True, kw_only=True)
class Migration:
    """A migration as its migrator describes it."""

    owner: Owner
    id: str
    destination: str
    begun: float = field(default_factory=time.monotonic)
    ended: float | None = None
    status: str = "running"
    error: str = ""
    cancel_requested: bool = False
    progress: Progress = field(default_factory=Progress)


class MachineEnvelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`GuestInfo.machine`: which engine can read the description."""

    engine: str
    description: bytes


class StateEnvelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `amig.guest.Guest.save` returns: the machine's state, and what its host knew beyond it."""

    machine: bytes
    paused: bool = False
    """An operator has paused the guest: it stays paused where it goes."""
