"""What a migration tells while it runs: typed events, bounded in number, encodable as JSON lines.

State changes are never dropped; progress that nobody has read is replaced by newer progress.
"""

from __future__ import annotations

import enum
import time

import msgspec


class State(enum.StrEnum):
    """Where a migration stands, as its source sees it."""

    CONNECTING = "connecting"
    """Reaching the guest and the destination; handshake."""
    MEMORY = "memory"
    """Precopy: the guest runs, its memory is sent round by round."""
    SWITCHOVER = "switchover"
    """The guest is paused; last pages and device state are sent."""
    RECONNECTING = "reconnecting"
    """The connection was lost before COMMIT: the guest runs, and the destination is sought again."""
    COMMITTING = "committing"
    """The destination has everything; past this point the source never runs the guest. Can't be cancelled."""
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        """Whether nothing follows."""
        return self in (State.COMPLETED, State.CANCELLED, State.FAILED)


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    at: float = msgspec.field(default_factory=time.time)
    """Unix time in seconds."""


class StateChanged(_Event, frozen=True, kw_only=True, tag="state"):
    """The migration has entered a state."""

    state: State
    reason: str = ""


class RoundEnded(_Event, frozen=True, kw_only=True, tag="round"):
    """All pages of a round have been taken, and the next sync is known."""

    round: int
    pages: int
    """Planned in this round."""
    remaining: int
    """Dirty pages found by the sync after it."""
    seconds: float
    bytes_per_s: float


class Progress(_Event, frozen=True, kw_only=True, tag="progress"):
    """How far the migration has come."""

    state: State
    round: int
    fraction: float
    """0 to 1; never runs backwards."""
    remaining_pages: int
    bytes_sent: int
    bytes_per_s: float
    dirty_bytes_per_s: float
    """Rate at which pages became dirty in the last round, in bytes of pages a second."""
    eta_s: float | None
    """Seconds to the switchover, None when it can't be told."""
    waiting_for: str
    """What stands between now and the switchover, for people."""


class Notice(_Event, frozen=True, kw_only=True, tag="notice"):
    """Something the operator should know that is not an error."""

    text: str


Event = StateChanged | RoundEnded | Progress | Notice


class PageCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of 4 KiB; see `amig.stats.MigrationStats`."""

    total: int = 0
    sent: int = 0
    zero: int = 0
    resent: int = 0
    delta: int = 0
    """Sent as their difference from an earlier version."""


class ByteCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes; ``memory`` before compression, ``wire`` as carried."""

    memory: int = 0
    wire: int = 0


class WindowMs(msgspec.Struct, frozen=True, kw_only=True):
    """From the start of a chunk's clear to the last byte read, in milliseconds."""

    p50: float = 0.0
    p99: float = 0.0
    max: float = 0.0


class Result(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="result"):
    """How a migration ended: the last line of ``amig migrate --json``."""

    status: str
    """``completed``, ``cancelled`` or ``failed``."""
    error: str | None = None
    exit_code: int = 0
    id: str = ""
    source: str = ""
    destination: str = ""
    engine: str = ""
    """``kvm`` or ``simulator``."""
    total_ms: float = 0.0
    downtime_ms: float | None = None
    """From the source's pause to the destination's RUNNING as the migrator saw them; None if it never came to that."""
    rounds: int = 0
    reconnects: int = 0
    """How often the connection was lost and the migration went on over a new one."""
    pages: PageCounts = PageCounts()
    bytes: ByteCounts = ByteCounts()
    window_ms: WindowMs = WindowMs()
    dirty_log: str = ""
    chunk_bytes: int = 0
    streams: int = 0
    compression: str = ""
    link_bytes_per_s: float = 0.0
    verified: str = "none"
    """What the destination compared, and found equal, before the guest could run: ``digests`` of all pages as sent and
    as placed, besides these all memory of both sides (``full``), or ``none``. Of a file nobody has yet compared
    anything: whoever restores it does."""
    stage_ms: dict[str, float] = {}
    """Time spent in sync, take (clear included), read, digests and compress."""
