"""What the guest protocol's messages are made of: bounds, base classes, and structures that several of them carry."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from amig.guest import Progress as Progress
from amig.memory import MAX_REGIONS, MAX_SLOTS, MemoryMap, Region, Slot

VERSION = 1
FEATURES = frozenset(
    {"take-socket", "take-sync", "migration-registry", "console", "guest-image", "apart", "vhost", "log-counters"}
)
"""What this version of the protocol can do beyond its fixed part; a client may require any of them by name."""

MAX_FRAME = 64 << 10
"""Bytes of any frame but those below."""
MAX_HELLO_FRAME = 1 << 20
"""A memory map of 512 slots and the machine's description."""
MAX_SAVE_FRAME = 32 << 20
"""Device and vCPU state."""
MAX_GIVE_BACK_WORDS = 6 << 10
"""Bitmap words in one ``give-back``; more go in several."""
MAX_CONSOLE_BYTES = 16 << 10

Id = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U64 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Short = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
MigrationId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]


def _kebab(name: str) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


class Message(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag=_kebab,
):
    """Anything that travels over the control socket."""


class Request(Message, frozen=True, kw_only=True):
    """Asks the host for something; answered by exactly one reply of the same ``id``, or by none if that is 0."""

    id: Id = 0


class Reply(Message, frozen=True, kw_only=True):
    """Answers the request of that ``id``."""

    id: Id = 0


class Notice(Message, frozen=True, kw_only=True):
    """Sent by the host unasked."""


class GuestProgress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What amig's own guest image counts in its memory, over all its vCPUs; absent for any other guest."""

    state: Short = ""
    workload: Short = ""
    heartbeat: U64 = 0
    writes: U64 = 0
    verified: U64 = 0
    passes: U64 = 0
    """Full passes of verification that every vCPU has made."""
    mismatches: U64 = 0
    verify_done: U64 = 0
    """The last number of `guest-ask` (``verify``) that every vCPU has answered."""
    verify_pages: U64 = 0
    """Pages verified by it, and"""
    verify_mismatches: U64 = 0
    """how many of them were wrong."""
    gap_ack: U64 = 0
    """The last number of `guest-ask` (``gap-reset``) that every vCPU has seen."""
    gap_max_ns: U64 = 0
    """Longest time that a vCPU's own clock saw it stand still since then."""


class WireRegion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`amig.memory.Region`."""

    id: Id
    size: U64


class WireSlot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`amig.memory.Slot`."""

    index: Id
    guest_phys: U64
    size: U64
    region: Id
    offset: U64


class WireMap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`amig.memory.MemoryMap`."""

    generation: U64
    regions: Annotated[tuple[WireRegion, ...], Meta(max_length=MAX_REGIONS)]
    slots: Annotated[tuple[WireSlot, ...], Meta(max_length=MAX_SLOTS)]

    @classmethod
    def of(cls, memory: MemoryMap) -> WireMap:
        """Translate for the wire."""
        return cls(
            generation=memory.generation,
            regions=tuple(WireRegion(id=r.id, size=r.size) for r in memory.regions),
            slots=tuple(
                WireSlot(index=s.index, guest_phys=s.guest_phys, size=s.size, region=s.region, offset=s.offset)
                for s in memory.slots
            ),
        )

    def memory_map(self) -> MemoryMap:
        """Translate back, checked; raises `UsageError`."""
        memory = MemoryMap(
            generation=self.generation,
            regions=tuple(Region(id=r.id, size=r.size) for r in self.regions),
            slots=tuple(
                Slot(index=s.index, guest_phys=s.guest_phys, size=s.size, region=s.region, offset=s.offset)
                for s in self.slots
            ),
        )
        memory.check()
        return memory
