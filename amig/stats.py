"""What a migration counts and measures. Pure: time comes in as a number of nanoseconds or seconds."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate


class Histogram:
    """Durations in nanoseconds, in buckets an eighth of an octave wide (so a percentile is right within 9 %).

    Bounded: 512 counters, whatever is recorded.
    """

    STEPS = 8

    def __init__(self) -> None:
        self._counts = [0] * (64 * self.STEPS)
        self.count = 0
        self.max_ns = 0

    def record(self, ns: int) -> None:
        """Count one duration; negative ones count as zero."""
        ns = max(ns, 0)
        bucket = int(math.log2(ns) * self.STEPS) if ns else 0
        self._counts[min(bucket, len(self._counts) - 1)] += 1
        self.count += 1
        self.max_ns = max(self.max_ns, ns)

    def percentile(self, share: float) -> float:
        """Return the upper edge in ns of the bucket below which ``share`` (0..1) of all durations lie; 0 if none."""
        if not self.count:
            return 0.0
        bucket = bisect_left(list(accumulate(self._counts)), share * self.count)
        return min(float(2 ** ((bucket + 1) / self.STEPS)), float(self.max_ns))


class LinkMeter:
    """How fast the link carries, measured only while something is really being sent (design rule 11).

    Any number of connections: time counts while at least one of them is sending. Older traffic fades, so that the
    figure follows a link that changes; ``memory`` is the number of bytes after which it weighs 1/e.
    """

    def __init__(self, memory: int = 64 << 20) -> None:
        self._memory = memory
        self._active = 0
        self._since = 0
        self._bytes = 0.0
        self._carried = 0.0
        self._busy_ns = 0.0

    def begin(self, now_ns: int) -> None:
        """A connection starts to send."""
        if self._active == 0:
            self._since = now_ns
        self._active += 1

    def end(self, now_ns: int, sent: int, carried: int | None = None) -> None:
        """A connection has sent ``sent`` bytes, which stand for ``carried`` bytes of memory; None: as many."""
        carried = sent if carried is None else carried
        fade = math.exp(-max(sent, carried) / self._memory)
        self._bytes = self._bytes * fade + sent
        self._carried = self._carried * fade + carried
        self._busy_ns = self._busy_ns * fade + (now_ns - self._since)
        self._since = now_ns
        self._active -= 1

    @property
    def bytes_per_s(self) -> float:
        """The rate, or 0 before anything was sent."""
        return self._bytes / self._busy_ns * 1e9 if self._busy_ns else 0.0

    @property
    def gain(self) -> float:
        """Bytes of guest memory that a byte on the link stands for, 1 before anything was sent."""
        return self._carried / self._bytes if self._bytes else 1.0

    @property
    def memory_per_s(self) -> float:
        """The same in bytes of guest memory: more than the link's when they travel compressed."""
        return self._carried / self._busy_ns * 1e9 if self._busy_ns else 0.0


@dataclass(slots=True, kw_only=True)
class MigrationStats:
    """Counters of one migration, source side. Pages are 4 KiB guest pages."""

    pages_total: int = 0
    """Pages of guest memory."""
    pages_sent: int = 0
    """Pages whose content went over the wire, counted each time."""
    pages_zero: int = 0
    """Zero pages sent as a bit, counted each time."""
    pages_holes: int = 0
    """Pages that nothing was ever put into: zero, and not even a bit is sent."""
    pages_delta: int = 0
    """Those of which only the difference from an earlier version was sent."""
    pages_resent: int = 0
    """Pages sent (as content or as a zero bit) after they had been sent before."""
    bytes_memory: int = 0
    """Guest bytes carried as content, before compression."""
    bytes_wire: int = 0
    """Bytes given to the connections, everything included."""
    chunks: int = 0
    empty_chunks: int = 0
    """Chunks without content since the last one that had any."""
    blocks: int = 0
    rounds: int = 0
    window: Histogram = field(default_factory=Histogram)
    """From the start of a chunk's clear to the last byte read of it."""
    link: LinkMeter = field(default_factory=LinkMeter)
    sync_ns: int = 0
    take_ns: int = 0
    read_ns: int = 0
    compress_ns: int = 0
    digest_ns: int = 0
