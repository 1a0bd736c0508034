"""The seam between mechanism and policy: what the pipeline asks of a guest, and nothing more.

`Guest` is the source side. It has two implementations that one set of tests holds to the same behaviour: in the process
that owns the guest (`amig.host.local.LocalGuest`), and over the control socket (`amig.control.client.SocketGuest`,
docs/guest-protocol.md). `Incoming` is the destination side: a guest that is being filled and will run here.

Order of a migration on the source::

    log_start → (sync → take_and_clear …)* → pause → sync, take… → save → sync, take… → prepare → commit → release

Whatever ends before ``commit`` ends in ``log_stop`` and a guest that runs as before.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from amig.memory import GuestMemory, MemoryMap, Pages, Words


class RunState(enum.StrEnum):
    """What a guest is doing, as `amig status` shows it."""

    INCOMING = "incoming"
    """Being filled by a migration; has never run here."""
    RUNNING = "running"
    PAUSED = "paused"
    """By an operator, or for the last pages of a migration."""
    COMMITTED = "committed"
    """Handed over: must not run here unless the destination is known to have discarded it."""
    STOPPED = "stopped"
    """Stopped by request, or moved away for good."""
    FAILED = "failed"
    """It stopped in a way it can't go on from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestInfo:
    """What a migrator has to know of a guest before it starts."""

    name: str
    engine: str
    """``"kvm"`` or ``"simulator"``; a claim about KVM must never be made of the second."""
    vcpus: int
    memory: MemoryMap
    state: RunState
    machine: bytes
    """Everything a destination needs to build the same machine (CPUID, clocks, devices): opaque to the migrator."""
    strategies: tuple[str, ...]
    """Dirty-log strategies that this host can offer, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStarted:
    """The log is on for this user."""

    strategy: str
    initially_set: bool
    generation: int
    """Of the memory map that every following take refers to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """Who takes the guest over: what the source's durable record holds."""

    migration: str
    """Migration id, 32 hex digits."""
    destination: str
    """Address, as the operator gave it."""
    peer: str
    """Identity that the destination stated: its host name and guest name."""


class Outcome(enum.StrEnum):
    """How a committed handover ended."""

    RUNNING = "running"
    """The destination runs it: the source may let go of memory and process."""
    DISCARDED = "discarded"
    """The destination said, durably, that it never will: the source takes the guest back."""


_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Word = Annotated[str, Meta(max_length=256)]


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A migrator's own figures, for others to look at; the host only keeps the last. See `amig.events.Progress`."""

    state: _Word = ""
    round: _Count = 0
    fraction: float = 0.0
    remaining_pages: _Count = 0
    bytes_sent: _Count = 0
    bytes_per_s: float = 0.0
    dirty_bytes_per_s: float = 0.0
    eta_s: float | None = None
    waiting_for: _Word = ""


class Guest(Protocol):
    """A guest that can be migrated away. Every method raises `ControlError` when the host refuses.

    Each instance that starts the log is one *user* of the guest's dirty log, with pending bits of its own.
    """

    on_cancel: Callable[[str], None] | None
    """Called with the id when an operator wants the migration cancelled that `migration_begin` has registered."""

    @property
    def info(self) -> GuestInfo:
        """As it was when this object was made."""

    @property
    def memory(self) -> GuestMemory:
        """Live memory, to be read only."""

    async def log_start(self, strategy: str | None, *, unsafe: bool = False) -> LogStarted:
        """Become a user of the dirty log; all pages are pending afterwards.

        ``strategy`` None takes the host's best, or the one in use, but is never its exact user: a migration names what
        it wants, the first of `GuestInfo.strategies` at best. Refused with code ``strategy-in-use`` when another user
        has set a different one, ``unsupported`` when this host can't do it, ``busy`` when it is ``exact`` and has its
        exact user, ``unsafe`` when it is known to lose pages and ``unsafe`` was not given.
        """

    async def sync(self) -> Mapping[int, Words]:
        """Ask the kernel what is dirty and return this user's pending bits of every region.

        The arrays are the caller's until its next ``sync``; nothing is taken or cleared by it.
        """

    async def take_and_clear(self, region: int, first: int, count: int) -> Words:
        """Take this user's pending bits of a range and clear them in the kernel, in one step.

        ``first`` is a multiple of 64; ``count`` too, unless it ends the region. Returns ``ceil(count/64)`` words, the
        caller's until it takes an overlapping range again. Pages may be read once it has returned, not before
        (design rule 1). A call under way finishes even when it is cancelled; its bits are then given back.
        """

    async def give_back(self, region: int, first: int, taken: Words) -> None:
        """Return taken bits to this user's pending ones: they were not delivered (design rule 9)."""

    async def log_stop(self) -> None:
        """Leave the log; the last user switches it off. No-op when not a user."""

    async def pause(self) -> None:
        """Stop all vCPUs at an instruction boundary; returns when none runs. Undone if this connection ends."""

    async def resume(self) -> None:
        """Undo ``pause``; a guest that an operator had paused stays paused."""

    async def save(self) -> bytes:
        """Return device and vCPU state of a paused guest; may dirty memory (design rule 8)."""

    async def prepare(self, handover: Handover) -> None:
        """Make sure that ``commit`` can't fail for want of space: the record is preallocated."""

    async def commit(self, migration: str) -> None:
        """Write the durable record; from its return on this host will not run the guest."""

    async def release(self, migration: str, outcome: Outcome) -> None:
        """End a committed handover; with RUNNING the host stops and exits, with DISCARDED the guest runs on."""

    async def migration_begin(self, migration: str, destination: str) -> None:
        """Claim the guest and show whoever asks its host that it is being moved; ``busy`` while another moves it."""

    def migration_progress(self, progress: Progress) -> None:
        """Show figures to whoever asks the host; never waits, and a lost one does not matter."""

    async def migration_end(self, status: str, error: str = "") -> None:
        """Say how it ended: ``completed``, ``cancelled`` or ``failed``, and why."""

    async def close(self) -> None:
        """Leave: logging off, a pause of ours undone, unless committed. Idempotent."""


class Incoming(Protocol):
    """A guest that arrives: built at the handshake, filled, loaded, and run after COMMIT."""

    async def build(self, *, name: str, machine: bytes, memory: MemoryMap) -> str:
        """Make memory and machine, or raise `Refused` with the reason; returns the identity to tell the source."""

    async def expect(self, migration: str) -> None:
        """Put on record, durably, that this migration arrives, so that a question for it can be answered later.

        Comes after ``build`` and before the source is welcomed. Raises `ControlError` for one that was here before.
        """

    def pages(self, region: int) -> Pages:
        """Writable memory of a region."""

    def populate(self, region: int, first: int, count: int) -> bool:
        """Have the kernel back a run of pages with memory ahead of their data; blocks for about 2 us a page.

        False: all memory has been backed long ago. May be called on any thread.
        """

    def punch(self, region: int, first: int, count: int) -> None:
        """Make a run of pages zero again, giving their memory back."""

    def data_ranges(self, region: int, first: int, count: int) -> list[tuple[int, int]]:
        """Return ``(first page, pages)`` of every run that is not a hole; see `GuestMemory.data_ranges`."""

    async def load(self, state: bytes) -> None:
        """Check device and vCPU state against its schema and restore it; raises `VerifyFailed`."""

    async def commit(self, migration: str) -> None:
        """Make RUNNING durable; only then may `run` be called."""

    async def run(self) -> None:
        """Start the vCPUs, and nothing else: until the source has heard of it, the guest counts as down."""

    async def settle(self) -> None:
        """Put away what only the arrival needed; comes after `run`. The guest runs whether it succeeds or not."""

    async def discard(self, migration: str) -> None:
        """Make DISCARDED durable if anything was promised, and let go of all memory."""
