"""What the operator wants of a migration, and the decision that follows from it after every round. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Literal

from amig.digest import Verify
from amig.errors import UsageError
from amig.memory import PAGE_SIZE

Compression = Literal["none", "zstd", "auto"]
OnTimeout = Literal["cancel", "switch"]

MIB = 1 << 20
MIN_CHUNK = 256 << 10
MAX_CHUNK = 1 << 30

KEEPALIVE = 5.0
STALL = 20.0
MAX_KEPT = 86400.0
"""Seconds that either side may be told to keep what it has for the other."""

FIXED = 0.016
"""Seconds of downtime that no measurement beforehand shows: kick, save, restore."""
MOST_CHOSEN = 4
"""Most connections, and threads that compress, that nobody has asked for."""
PACE_BYTES = 32 * MIB
"""A round that is shorter does not count for the pace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Limits and choices of one migration. Raises `UsageError` when a value makes no sense."""

    bandwidth: float | None = None
    """Most bytes a second over all connections; None: as fast as the link."""
    downtime: float = 0.1
    """Seconds the guest may stand still."""
    max_rounds: int = 1000
    """Rounds before ``on_timeout`` applies."""
    timeout: float | None = None
    """Seconds from the start after which ``on_timeout`` applies; None: no limit."""
    on_timeout: OnTimeout = "cancel"
    """``cancel``: the guest stays; ``switch``: it moves with whatever downtime that takes."""
    chunk: int = 4 * MIB
    """Most dirty bytes of a chunk."""
    chunk_span: int | None = None
    """Most bytes of address range of a chunk; None: as far as the dirty bytes reach."""
    dirty_log: str | None = None
    """Strategy of the dirty log; None: the host's best."""
    may_lose_pages: bool = False
    """Allow a ``dirty_log`` that is known to lose pages: for comparisons, with a guest that nobody needs."""
    compression: Compression = "none"
    level: int = 1
    """zstd level, 1 to 19."""
    delta_cache: int = 0
    """Bytes of memory for page versions that were sent, so that pages sent again travel as their difference."""
    workers: int | None = None
    """Threads that compress; None: what this machine's processors allow, see `settled`."""
    streams: int | None = None
    """Connections that carry memory; None: what pays with this machine's processors, see `settled`."""
    verify: Verify = "digests"
    """``digests``: of every page as sent and as placed, compared before the guest may run. ``full``: besides, all
    memory of both sides is hashed again while the guest is paused, which exceeds the downtime limit. ``off``."""
    connect_timeout: float = 10.0
    """Seconds for each connection and for the handshake."""
    handover_timeout: float = 30.0
    """Seconds to wait for each answer of the handover (PREPARED, RUNNING)."""
    reconnect: float = 30.0
    """Seconds for which the destination is sought again after a lost connection, the guest running; 0: not at all."""
    keepalive: float = KEEPALIVE
    """Seconds without a byte after which the destination is asked for a sign of life."""
    stall: float = STALL
    """Seconds without a byte, or an answer to that, after which the connection counts as lost."""

    def __post_init__(self) -> None:
        checks = (
            (self.bandwidth is None or self.bandwidth >= 1 << 16, "bandwidth below 64 KiB/s"),
            (0 < self.downtime <= 3600, "a downtime limit that is not between 0 and 1 h"),
            (1 <= self.max_rounds <= 1_000_000, "a number of rounds that is not between 1 and 1000000"),
            (self.timeout is None or self.timeout > 0, "a timeout that is not above 0"),
            (self.on_timeout in ("cancel", "switch"), "on-timeout that is neither cancel nor switch"),
            (MIN_CHUNK <= self.chunk <= MAX_CHUNK, "a chunk that is not between 256KiB and 1GiB"),
            (self.chunk_span is None or self.chunk_span >= MIN_CHUNK, "a chunk span below 256KiB"),
            (self.compression in ("none", "zstd", "auto"), "compression that is not none, zstd or auto"),
            (self.verify in ("digests", "full", "off"), "verify that is not digests, full or off"),
            (1 <= self.level <= 19, "a zstd level that is not between 1 and 19"),
            (0 <= self.delta_cache <= 1 << 44, "a delta cache that is not between 0 and 16 TiB"),
            (self.workers is None or 1 <= self.workers <= 64, "a number of workers that is not between 1 and 64"),
            (self.streams is None or 1 <= self.streams <= 64, "a number of streams that is not between 1 and 64"),
            (self.connect_timeout > 0 and self.handover_timeout > 0, "a time limit that is not above 0"),
            (0 <= self.reconnect <= MAX_KEPT, "a time to reconnect that is not between 0 and 1 day"),
            (self.keepalive > 0 and self.stall > 0, "a keep-alive or a stall that is not above 0"),
        )
        for sane, fault in checks:
            if not sane:
                raise UsageError(f"the policy asks for {fault}")

    def settled(self, *, processors: int, parallel: bool) -> Policy:
        """Return it with numbers where it left the choice.

        Connections pay where they move pages side by side (``parallel``), each with a thread of its own, up to one for
        each of this machine's processors. Threads that compress leave one for the rest of the pipeline.
        """
        return replace(
            self,
            streams=self.streams or (min(processors, MOST_CHOSEN) if parallel else 1),
            workers=self.workers or max(1, min(processors - 1, MOST_CHOSEN)),
        )


@dataclass(slots=True, kw_only=True)
class Limits:
    """The part of a policy that may change while the migration runs."""

    bandwidth: float | None
    downtime: float

    @classmethod
    def of(cls, policy: Policy) -> Limits:
        """Return the limits a migration starts with."""
        return cls(bandwidth=policy.bandwidth, downtime=policy.downtime)


class Verdict(enum.Enum):
    """What to do after a round."""

    GO_ON = "go on"
    SWITCH = "switch"
    """The remaining pages fit the downtime limit."""
    FORCE = "force"
    """They don't, but a limit was reached and the operator said ``switch``."""
    GIVE_UP = "give up"
    """They don't, a limit was reached and the operator said ``cancel``."""


@dataclass(slots=True, kw_only=True)
class Convergence:
    """Decides after every sync whether the guest can be moved within its downtime limit.

    The budget is what is left to send at the rate achieved, plus the fixed part: kick, final sync, save, round trips,
    the two durable records, restore. The rate is the link's, the pace at which whole rounds really went, or what the
    operator allows, whichever is least: a link that could carry more is no help when the processors can't, and what it
    carried after a rest, it will not carry for long.
    """

    policy: Policy
    limits: Limits
    fixed: float = FIXED
    """Seconds; `measured` adds what was measured to the least."""
    pace: float = 0.0
    """Bytes a second at which rounds went from their first clear to their last; 0 before the first."""
    history: list[float] = field(default_factory=list)
    """Remaining bytes seen after each round, the last 16."""

    def measured(self, *, round_trip: float, record: float) -> None:
        """Take in the seconds of one round trip to the destination, and of making the durable record here."""
        self.fixed = FIXED + 2 * round_trip + record

    def round_took(self, size: int, seconds: float) -> None:
        """Take in how long a round of ``size`` bytes took.

        Small ones say more about overhead than about pace, unless they are faster than what is known: else a guest
        that writes little would keep the pace of a first pass over a link that was slow then.
        """
        if seconds > 0 and (size >= PACE_BYTES or size / seconds > self.pace > 0):
            self.pace += (size / seconds - self.pace) * (0.5 if self.pace else 1.0)

    def rate(self, link: float, gain: float = 1.0) -> float:
        """Return the bytes of memory a second to count with; ``link``: what the link carries while it is sent on.

        ``gain`` is the bytes of memory that a byte on the link stands for.
        """
        if self.limits.bandwidth is not None:
            link = min(link, self.limits.bandwidth * gain)
        return min(link, self.pace) if self.pace else link

    @property
    def set_aside(self) -> float:
        """Seconds of the limit that are not for pages: at most half of it.

        A disk that was slow once must not put the limit out of reach, nor may one that is shorter than the fixed part.
        """
        return min(self.fixed, self.limits.downtime / 2)

    @property
    def overrun(self) -> float:
        """Seconds by which a pause may exceed the limit, because the fixed part takes more than is set aside for it."""
        return self.fixed - self.set_aside

    def downtime(self, remaining_bytes: float, rate: float) -> float:
        """Return the expected downtime in seconds."""
        return self.set_aside + (remaining_bytes / rate if rate else float("inf") if remaining_bytes else 0.0)

    def judge(self, *, rounds: int, remaining_bytes: float, rate: float, elapsed: float) -> Verdict:
        """Decide; ``rounds`` are those done, ``rate`` in bytes/s, ``elapsed`` in seconds since the start."""
        self.history = [*self.history[-15:], remaining_bytes]
        if self.downtime(remaining_bytes, rate) <= self.limits.downtime or remaining_bytes <= 4 * PAGE_SIZE:
            return Verdict.SWITCH
        late = self.policy.timeout is not None and elapsed >= self.policy.timeout
        if late or rounds >= self.policy.max_rounds:
            return Verdict.FORCE if self.policy.on_timeout == "switch" else Verdict.GIVE_UP
        return Verdict.GO_ON
