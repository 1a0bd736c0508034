"""The observer of one migration, amig's or QEMU's: ``python -m tests.bench.watch SOURCE-PID DESTINATION-PID``.

It must see the pause to a tenth of a millisecond and not take a processor of two from what it measures. So it looks
every two milliseconds while the guest beats, and closely only once the beat has stopped: the *last* beat is not caught
in the act but read afterwards, from the time stamp that the guest stores with it, translated to this machine's clock by
what earlier looks have seen; the *first* beat at the destination is caught by looking closely.

Lines on standard input: ``settle``, ``go``, ``with PID`` (a further process of the source), end of file. Each is
answered by one line of JSON, and a last line tells what was seen once the guest beats at the destination.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import threading
import time
from collections import deque
from typing import Any

import msgspec

from tests.bench import processes
from tests.bench.lowmem import HEARTBEAT, TSC, WRITES, LowMemory, held

FAR, NEAR = 2e-3, 100e-6
"""Seconds between two looks: while it beats, and while it does not."""
STALL = 2_500_000
"""Nanoseconds without a beat after which to look closely. The guest beats every 0.1 to 0.2 ms, but where there are more
busy threads than processors it waits for some milliseconds again and again, and close looks cost a tenth of a core."""
MEMORY_PERIOD = 25_000_000
_PR_SET_TIMERSLACK = 29
_RECENT = 64


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one migration, seen from outside. Times are of CLOCK_MONOTONIC, in seconds."""

    began_s: float
    """When everything was measured for the first time, just before the command."""
    landed_s: float
    """The first beat at the destination."""
    downtime_ms: float
    uncertain_ms: float
    """The look at the first beat came so much after the one before, at most."""
    stalled_ms: float
    """The longest time without a beat before that: what this machine does to the guest anyway."""
    idle_writes_per_s: float
    """Undisturbed, before."""
    writes_per_s: float
    """From the first measurement to the first beat at the destination, the downtime included."""
    cpu_source_s: float
    """All processes of the source, the vCPU left out."""
    cpu_destination_s: float
    cpu_vcpu_s: float
    """The vCPU at the source."""
    source_bytes: int
    """Most private memory of the processes of the source, each at its worst, and memfds that are not the guest's."""
    destination_bytes: int
    looks: int
    observer_cpu_s: float
    """What watching took, from the first measurement on."""


class GuestClock:
    """Translates the guest's time stamps to this machine's clock, from pairs seen together."""

    def __init__(self, khz: float) -> None:
        self._per_tick = 1e6 / khz
        self._recent: deque[tuple[int, int]] = deque(maxlen=_RECENT)
        self._anchor: tuple[int, int] | None = None

    def seen(self, now: int, tsc: int) -> None:
        """Take in that at ``now`` (ns) the last beat had the stamp ``tsc``: it was then, or a little before."""
        self._recent.append((now, tsc))

    def settle(self) -> None:
        """Keep the best of the recent pairs, or with the one kept before find the true length of a tick."""
        best = self._best()
        if self._anchor is None:
            self._anchor = best
        elif best is not None and best[1] - self._anchor[1] > 1 << 24:
            self._per_tick = (best[0] - self._anchor[0]) / (best[1] - self._anchor[1])

    def at(self, tsc: int) -> float:
        """Return when a stamp was made (ns)."""
        best = self._best()
        return math.nan if best is None else best[0] + (tsc - best[1]) * self._per_tick

    def _best(self) -> tuple[int, int] | None:
        # The pair with the least time between stamp and look; the others had to wait for the look.
        return min(self._recent, key=lambda pair: pair[0] - pair[1] * self._per_tick, default=None)


class Beat:
    """Follows one vCPU from its last beat here to its first one there. Pure: looks come in."""

    def __init__(self, clock: GuestClock) -> None:
        self._clock = clock
        self._beat = self._tsc = -1
        self._changed = self._look = 0
        self._before = 0
        self.stalled = 0
        self.downtime: float | None = None
        """Nanoseconds, once it has landed."""
        self.uncertain = 0

    def look(self, now: int, there: int, here: int, tsc: int) -> bool:
        """Take in one look (``there`` read before ``here``); returns whether the guest runs over there."""
        step, self._look = now - self._look if self._look else 0, now
        if here != self._beat:
            if self._beat >= 0:
                self.stalled = max(self.stalled, now - self._changed)
                self._before = now - step
            else:
                self._before = now
            self._beat, self._changed = here, now
            self._clock.seen(now, tsc)
        self._tsc = tsc
        # The source's own beats arrive as pages; only a guest that runs there can be ahead of them.
        if there <= here:
            return False
        # The stamp says when the last beat was; it can't have been outside of the two looks around it.
        last = self._clock.at(self._tsc)
        if not self._before <= last <= self._changed:
            last = min(max(last, self._before), self._changed) if last == last else self._changed
        self.downtime, self.uncertain = now - last, step
        return True

    def silent(self, now: int) -> bool:
        """Whether it has not beaten for so long that it is worth looking closely."""
        return now - self._changed > STALL


class Costs:
    """What the processes of both sides have cost since a moment."""

    def __init__(self, source: int, destination: int) -> None:
        self._source, self._destination = source, destination
        self._more: list[int] = []
        self._start: dict[int, float] = {}
        self._vcpu: int | None = None
        self._vcpu_start = 0.0
        self._threads: dict[int, float] = {}
        self._peak: dict[int, int] = {}

    def settle(self) -> None:
        """Begin to find out which thread is the vCPU."""
        self._threads = processes.thread_cpu_s(self._source)

    def begin(self) -> None:
        """Count from here."""
        now = processes.thread_cpu_s(self._source)
        self._vcpu = processes.busiest(self._threads, now)
        self._vcpu_start = now.get(self._vcpu or 0, 0.0)
        self._start = {pid: processes.cpu_s(pid) for pid in (self._source, self._destination)}
        self.sample()

    def join(self, pid: int) -> None:
        """Count a further process of the source from its start."""
        self._more.append(pid)
        self._start[pid] = 0.0

    def sample(self) -> None:
        """Look at the memory."""
        for pid in (self._source, self._destination, *self._more):
            self._peak[pid] = max(self._peak.get(pid, 0), processes.private_bytes(pid))

    def end(self) -> dict[str, float | int]:
        """Return everything, by the names in `Seen`."""
        used = {pid: processes.cpu_s(pid) - start for pid, start in self._start.items()}
        vcpu = processes.thread_cpu_s(self._source).get(self._vcpu or 0, self._vcpu_start) - self._vcpu_start
        self.sample()
        here: dict[tuple[int, int], int] = {}
        for pid in (self._source, *self._more):
            here |= held(pid)
        there = held(self._destination)
        return {
            "cpu_source_s": used[self._source] + sum(used[pid] for pid in self._more) - vcpu,
            "cpu_destination_s": used[self._destination],
            "cpu_vcpu_s": vcpu,
            "source_bytes": sum(self._peak[pid] for pid in (self._source, *self._more)) + sum(here.values()),
            "destination_bytes": self._peak[self._destination] + sum(there.values()),
        }


def watch(source: int, destination: int, said: deque[str], done: threading.Event) -> Seen | None:
    """Look until the guest has landed, or until told to stop; None when it has not."""
    here = LowMemory.of(source)
    if here is None:
        raise RuntimeError(f"process {source} has no guest memory")
    clock = GuestClock(float(here.status()["tsc_khz"]))
    beat, costs = Beat(clock), Costs(source, destination)
    words = here.words
    there: LowMemory | None = None
    settled = (time.monotonic_ns(), words[WRITES])
    began, idle, looks, next_memory, own = (0, 0), 0.0, 0, 0, 0.0
    while not done.is_set():
        while said:
            word, _, rest = said.popleft().partition(" ")
            if word == "settle":
                clock.settle()
                costs.settle()
                settled = (time.monotonic_ns(), words[WRITES])
            elif word == "with":
                costs.join(int(rest))
            elif word == "go":
                clock.settle()
                beat.stalled = 0
                began = (time.monotonic_ns(), words[WRITES])
                idle = (began[1] - settled[1]) / (began[0] - settled[0]) * 1e9
                costs.begin()
                own = time.process_time()
            answer({"done": word})
        now = time.monotonic_ns()
        if now >= next_memory:
            next_memory = now + MEMORY_PERIOD
            costs.sample()
            there = there or LowMemory.of(destination)
        time.sleep(NEAR if beat.silent(now) else FAR)
        arrived = there.words[HEARTBEAT] if there else 0
        tsc, beats = words[TSC], words[HEARTBEAT]
        looks += 1
        if beat.look(time.monotonic_ns(), arrived, beats, tsc) and began[0] and there and beat.downtime is not None:
            landed = time.monotonic_ns()
            writes = there.words[WRITES]
            return Seen(
                began_s=began[0] / 1e9,
                landed_s=landed / 1e9,
                downtime_ms=beat.downtime / 1e6,
                uncertain_ms=beat.uncertain / 1e6,
                stalled_ms=beat.stalled / 1e6,
                idle_writes_per_s=idle,
                writes_per_s=(writes - began[1]) / (landed - began[0]) * 1e9,
                looks=looks,
                observer_cpu_s=time.process_time() - own,
                **costs.end(),  # type: ignore[arg-type]
            )
    return None


def answer(value: Any) -> None:
    """Say one line."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the observer."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # short sleeps are rounded up by 50 us else
    said: deque[str] = deque(maxlen=16)
    done = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            said.append(line.strip())
        done.set()

    threading.Thread(target=listen, daemon=True).start()
    answer({"watching": True})
    seen = watch(int(sys.argv[1]), int(sys.argv[2]), said, done)
    answer({"landed": seen is not None, **({} if seen is None else msgspec.to_builtins(seen))})


if __name__ == "__main__":
    main()
