"""What one migration of the bench came to. Plain data, also at the pipe between the migrator and the bench."""

from __future__ import annotations

import msgspec

from amig.events import Result


class LogCost(msgspec.Struct, frozen=True, kw_only=True):
    """What the dirty log did until the guest was released, and the time spent in the kernel for it."""

    syncs: int = 0
    gets: int = 0
    get_ms: float = 0.0
    clears: int = 0
    clear_ms: float = 0.0
    pages_cleared: int = 0
    ring_full: int = 0


class Moved(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="moved"):
    """What the migrator of one run saw."""

    result: Result
    idle_rate: float
    """Pages that the guest wrote in a second before, no log being on."""
    rate: float
    """And from the log's start to the pause."""
    skipped: int
    """Page writes that the guest gave up meanwhile, because it could not keep the pace."""
    log_start_ms: float
    """To switch the log on and learn what it starts with."""
    rounds: tuple[tuple[int, int, float, float], ...]
    """Of each round: pages planned, pages dirty after it, seconds, link in bytes a second while sending."""
    log: LogCost | None = None
    """None when the migration did not get so far."""

    @property
    def link(self) -> float:
        """Bytes a second while really sending, over all rounds."""
        busy = sum(pages / rate for pages, _, _, rate in self.rounds if rate)
        sent = sum(pages for pages, _, _, rate in self.rounds if rate)
        return sent / busy if busy else float(self.result.link_bytes_per_s)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one variant."""

    variant: str
    number: int
    moved: Moved | None = None
    downtime_ms: float | None = None
    """From outside: the heartbeat in both memories."""
    uncertain_ms: float | None = None
    error: str | None = None
    """Why there is nothing more to say."""

    @property
    def completed(self) -> bool:
        """Whether the guest moved."""
        return self.moved is not None and self.moved.result.status == "completed"
