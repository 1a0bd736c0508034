"""Turns what the stages count into progress for people: monotone, with the time left and what it waits for."""

from __future__ import annotations

import time
from collections.abc import Callable

from amig.events import Event, Progress, RoundEnded, State
from amig.memory import PAGE_SIZE
from amig.policy import Convergence
from amig.stats import MigrationStats

Tell = Callable[[Event], None]


class ProgressMeter:
    """Keeps the figures that progress is made of; `amig.stages.dirty_sync.Observer`."""

    def __init__(self, stats: MigrationStats, convergence: Convergence, tell: Tell) -> None:
        self._stats = stats
        self._convergence = convergence
        self._tell = tell
        self._round = 0
        self._planned = 0
        self._before = 0
        self._began = time.monotonic()
        self._dirty_rate = 0.0
        self._first_pass = True
        self._whole = 0
        """Pages of the first pass as it was planned first."""
        self._fraction = 0.0

    def round_started(self, round_: int, pages: int, *, first_pass: bool) -> None:
        """A round has been planned."""
        self._round = round_
        self._first_pass = first_pass
        self._whole = max(self._whole, pages)
        self._planned = pages
        self._before = self._stats.pages_sent + self._stats.pages_zero
        self._began = time.monotonic()

    def round_ended(self, round_: int, pages: int, remaining: int, seconds: float) -> None:
        """All its pages have been taken."""
        if seconds > 0:
            self._dirty_rate = remaining * PAGE_SIZE / seconds
        self._tell(
            RoundEnded(
                round=round_,
                pages=pages,
                remaining=remaining,
                seconds=seconds,
                bytes_per_s=self._stats.link.bytes_per_s,
            )
        )

    def now(self, state: State) -> Progress:
        """Return progress as of now."""
        stats, rate = self._stats, self._convergence.rate(self._stats.link.bytes_per_s)
        done = stats.pages_sent + stats.pages_zero - self._before
        remaining = max(self._planned - done, 0)
        eta, why = self._estimate(state, remaining * PAGE_SIZE, rate)
        self._fraction = max(self._fraction, self._share(state, remaining))
        return Progress(
            state=state,
            round=self._round,
            fraction=round(self._fraction, 4),
            remaining_pages=remaining,
            bytes_sent=stats.bytes_wire,
            bytes_per_s=rate,
            dirty_bytes_per_s=self._dirty_rate,
            eta_s=eta,
            waiting_for=why,
        )

    def _share(self, state: State, remaining: int) -> float:
        if state is State.COMPLETED:
            return 1.0
        if self._first_pass:  # most of the way for a guest that converges, over however many connections it takes
            return 0.9 * (1 - remaining / self._whole) if self._whole else 0.0
        total = max(self._stats.pages_total, 1)
        return 0.9 + 0.09 * (1 - min(remaining / total, 1.0))

    def _estimate(self, state: State, left: float, rate: float) -> tuple[float | None, str]:
        if state is State.CONNECTING:
            return None, "the destination"
        if state is State.RECONNECTING:
            return None, "the destination, to which the connection was lost"
        if state is State.SWITCHOVER:
            return 0.0, "the last pages and the device state"
        if state is State.COMMITTING:
            return 0.0, "the destination to run the guest"
        if state.final:
            return 0.0, ""
        if not rate:
            return None, "the first block to be sent"
        if self._first_pass:
            return left / rate, "the first pass over memory"
        fits = self._convergence.limits.downtime - self._convergence.set_aside
        if self._dirty_rate >= rate:
            return None, (
                f"the guest to write less: it dirties {self._dirty_rate / 1e6:.0f} MB/s and "
                f"{rate / 1e6:.0f} MB/s get through"
            )
        # Each round leaves the share of it that was dirtied meanwhile: a geometric series down to what fits.
        share = self._dirty_rate / rate
        target = max(fits, 0.0) * rate
        seconds = max(left - target, 0.0) / rate / (1 - share)
        return seconds, f"less than {target / 2**20:.0f} MiB dirty, to fit the downtime limit"
