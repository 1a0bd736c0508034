"""T9: is the cost of a migration linear in the guest's size, and what does the bitmap work of 1 TiB take?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from amig import bitmap
from amig.bench.table import table
from amig.dirty.hub import DirtyLogHub
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot, Words
from amig.policy import Policy
from amig.sim.kernel_log import SimKernelLog
from amig.stages.dirty_sync import hot_last
from tests.bench.report import kind
from tests.bench.summary import LINEAR, Report, line_fit

TIB = 1 << 40
LIMIT_MS = 100.0
"""Of one round of a 1 TiB guest: sync and scan."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """How one cost grows."""

    what: str
    preallocated: bool
    """Whether the destinations had their memory beforehand."""
    fixed: float
    per_gib: float
    off: float
    """Largest distance from the line, by the line."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """The bitmap work of one round of a simulated guest, in milliseconds."""

    size: int
    dirty: str
    pages: int
    ranges: int
    sync_ms: tuple[float, ...]
    scan_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Of both together."""
        return statistics.median(a + b for a, b in zip(self.sync_ms, self.scan_ms, strict=True))


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """What the JSON file holds."""

    machine: dict[str, str]
    lines: tuple[Line, ...]
    rounds: tuple[Round, ...]


def lines(reports: Sequence[Report]) -> list[Line]:
    """Return how the costs of the first mode grow over the sizes that were run, for each kind of destination."""
    found: list[Line] = []
    for preallocated in (False, True):
        rows = [(_gib(one), row) for one in reports for row in one.rows if row.preallocated == preallocated]
        first = [(gib, row) for gib, row in rows if row.mode == rows[0][1].mode]
        total = [(gib, row.total_s.median) for gib, row in first if row.total_s is not None]
        cpu = [(gib, row.cpu_gib_s.median * gib) for gib, row in first if row.cpu_gib_s is not None]
        for what, points in (("total time, s", total), ("CPU time of both sides, s", cpu)):
            if len(points) >= 3:
                a, b, off = line_fit([p[0] for p in points], [p[1] for p in points])
                found.append(Line(what=what, preallocated=preallocated, fixed=a, per_gib=b, off=off))
    return found


def _gib(report: Report) -> float:
    return float(report.setting["memory"].split()[0]) / 1024


def rounds(size: int = TIB, repeat: int = 5) -> list[Round]:
    """Measure sync (GET of the kernel's bits, handed to the user) and scan (count, cut and sort) of one round."""
    pages = size // PAGE_SIZE
    random = np.random.default_rng(1)
    full = bitmap.ones(pages)
    kinds: dict[str, Words] = {
        "nothing": bitmap.zeros(pages),
        "1 page in 1000, at random": _random(pages, pages // 1000, random),
        "1 page in 10, at random": _random(pages, pages // 10, random),
        "1 GiB in a row": _row(pages, min(pages, (1 << 30) // PAGE_SIZE)),
        "everything": full,
    }
    return [_round(size, kind, words, repeat) for kind, words in kinds.items()]


def _random(pages: int, count: int, random: np.random.Generator) -> Words:
    words = bitmap.zeros(pages)
    index = random.integers(0, pages, count, dtype=np.int64)
    np.bitwise_or.at(words, index >> 6, np.left_shift(np.uint64(1), (index & 63).astype(np.uint64)))
    return words


def _row(pages: int, count: int) -> Words:
    words = bitmap.zeros(pages)
    bitmap.set_range(words, min(pages // 3, pages - count), count)
    return words


def _round(size: int, kind: str, words: Words, repeat: int) -> Round:
    pages = size // PAGE_SIZE
    slot = Slot(index=0, guest_phys=0, size=size, region=0, offset=0)
    memory = MemoryMap(generation=1, regions=(Region(id=0, size=size),), slots=(slot,))
    log = SimKernelLog(memory)
    hub = DirtyLogHub(log, memory)
    user = hub.open("bench", "exact")
    limit = Policy().chunk // PAGE_SIZE
    sync, scan, found = [], [], 0
    try:
        user.take_and_clear(0, 0, pages, 1)  # what is pending from the start
        into = {0: np.zeros(bitmap.words_for(pages), np.uint64)}
        for _ in range(repeat):
            user.take_and_clear(0, 0, pages, 1)
            user.give_back(0, 0, words)  # as if the guest had written them
            began = time.perf_counter()
            user.sync(into)
            synced = time.perf_counter()
            bitmap.count(into[0])
            found = len(hot_last(bitmap.cut(into[0], 0, limit, None, pages=pages)))
            scanned = time.perf_counter()
            sync.append((synced - began) * 1e3)
            scan.append((scanned - synced) * 1e3)
    finally:
        user.close()
    return Round(
        size=size, dirty=kind, pages=bitmap.count(words), ranges=found, sync_ms=tuple(sync), scan_ms=tuple(scan)
    )


def markdown(growth: Growth) -> str:
    """Return the part of a page about it."""
    out = ["; ".join(f"{name}: {value}" for name, value in growth.machine.items()) + ".", ""]
    if growth.lines:
        costs = [
            (
                one.what,
                kind(preallocated=one.preallocated),
                f"{one.fixed:.3f}",
                f"{one.per_gib:.3f}",
                f"{one.off * 100:.1f} %",
                _word(one.off <= LINEAR),
            )
            for one in growth.lines
        ]
        head = ("cost of idle guests, all touched", "destination", "fixed", "a GiB", "off the line", "")
        out += [*table(head, costs), ""]
    body = [
        (
            one.dirty,
            str(one.pages),
            str(one.ranges),
            f"{statistics.median(one.sync_ms):.1f}",
            f"{statistics.median(one.scan_ms):.1f}",
            f"{one.median_ms:.1f}",
            _word(one.median_ms <= LIMIT_MS),
        )
        for one in growth.rounds
    ]
    size = growth.rounds[0].size >> 30 if growth.rounds else 0
    head = (f"dirty in {size} GiB", "pages", "extents", "sync ms", "scan ms", "both", f"at most {LIMIT_MS:.0f}")
    return "\n".join([*out, *table(head, body)]) + "\n"


def _word(met: bool) -> str:
    return "met" if met else "**missed**"
