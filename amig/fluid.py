"""The fluid limit: how long a precopy of randomly written memory takes at least, whatever the design. Pure.

Each send is thought to clear and read a page at one instant, in any order, and the memory that nobody writes goes
first. With f the dirty share of the working set: ``df/dt = -B/N + (D/N)(1 - f)``, until what is left fits the downtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from amig.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One migration, in pages and pages a second."""

    memory: float
    """Pages that are not zero, M."""
    working_set: float
    """Pages that the guest writes at random, N; at most M."""
    dirty_rate: float
    """Page writes a second, repeated ones included, D."""
    link: float
    """Pages that the link carries a second, B."""
    downtime: float
    """Seconds, T."""

    def __post_init__(self) -> None:
        if not 0 <= self.working_set <= self.memory or self.link <= 0 or self.dirty_rate < 0 or self.downtime < 0:
            raise UsageError("the fluid limit needs a link, and a working set that is part of the memory")


def seconds(flow: Flow) -> float:
    """Return the least total time; infinity when the rest never fits the downtime.

    ``(M - N)/B + (N/D) ln[(B/D) / (B/D - 1 + B T/N)] + T``, and what is less than T holds is sent within it.
    """
    n, d, b, t = flow.working_set, flow.dirty_rate, flow.link, flow.downtime
    first = (flow.memory - n) / b
    if n <= b * t:
        return first + n / b
    if d == 0:
        return first + n / b
    speed = b / d
    left = speed - 1 + b * t / n
    if left <= 0:
        return math.inf
    return first + n / d * math.log(speed / left) + t


def pages_sent(flow: Flow) -> float:
    """Return how many pages go over the link in that time."""
    return seconds(flow) * flow.link
