"""What one run came to. Plain data, kept in the JSON reports."""

from __future__ import annotations

import msgspec


class TooLong(Exception):
    """A migration was ended because its time was up."""

    def __init__(self, seconds: float, rounds: int, pages: int) -> None:
        super().__init__(f"it did not end in {seconds:g} s: after {rounds} rounds {pages} pages were left")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One migration; None is what was not measured, or has no meaning for this side."""

    scenario: str
    mode: str
    side: str
    preallocated: bool
    turn: int
    error: str | None = None
    """Why it is not whole: what did not work, or that it did not end in time."""

    total_s: float | None = None
    """From the command (for amig: the start of the process ``amig migrate``) to the guest's first beat over there."""
    start_s: float | None = None
    """Of it, until the migration began: amig's program is loaded, QEMU's runs already."""
    start_cpu_s: float | None = None
    """Processor seconds of that start; they are in ``cpu_source_s``, too."""
    told_s: float | None = None
    """Total time in the tool's own words."""
    downtime_ms: float | None = None
    uncertain_ms: float | None = None
    told_downtime_ms: float | None = None
    stalled_ms: float | None = None
    """Longest time without a beat before the switchover."""
    progress: float | None = None
    """Pages the guest wrote a second from the command until it ran over there, by those it wrote before."""
    idle_writes_per_s: float | None = None
    pages_sent: int | None = None
    pages_zero: int | None = None
    bytes_wire: int | None = None
    rounds: int | None = None
    link_bytes_per_s: float | None = None
    """While really sending; QEMU does not tell."""
    window_ms: float | None = None
    throttle: float | None = None
    """Per cent of its time that QEMU took from the guest at last."""
    cpu_source_s: float | None = None
    cpu_destination_s: float | None = None
    cpu_vcpu_s: float | None = None
    observer_cpu_s: float | None = None
    source_bytes: int | None = None
    destination_bytes: int | None = None
    limit_s: float | None = None
    """The fluid limit at the rates of this run."""

    @property
    def whole(self) -> bool:
        """Whether it ended, and well."""
        return self.error is None and self.total_s is not None

    @property
    def moving_s(self) -> float | None:
        """Total time without the start of the program."""
        return None if self.total_s is None else self.total_s - (self.start_s or 0.0)

    @property
    def cpu_s(self) -> float | None:
        """Processor seconds of both sides, vCPU apart."""
        if self.cpu_source_s is None or self.cpu_destination_s is None:
            return None
        return self.cpu_source_s + self.cpu_destination_s

    @property
    def moving_cpu_s(self) -> float | None:
        """Processor seconds without the start of the program."""
        return None if self.cpu_s is None else self.cpu_s - (self.start_cpu_s or 0.0)

    @property
    def extra_bytes(self) -> int | None:
        """Private memory of the side that has more."""
        if self.source_bytes is None or self.destination_bytes is None:
            return None
        return max(self.source_bytes, self.destination_bytes)
