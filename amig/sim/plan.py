"""Which of its memory a simulated guest uses for what, and the status page that says so: guest/memory.c in Python.

The status page, the vCPU blocks and the control page lie where the guest image has them, so that whoever observes a
guest needs no second way. From `USABLE` up come the generation tables of the checking workload, each vCPU's on pages of
its own, then the working set, then the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from amig.errors import UsageError
from amig.host import guest_abi as abi
from amig.host.guest_abi import PAGE_SIZE, Fill, Work
from amig.sim.options import SimOptions
from amig.sim.ram import Frames, SimRam

USABLE: Final = 0x200000
"""Guest-physical; below lies what the real image needs for itself."""

TSC_KHZ: Final = 1_000_000
"""The simulated TSC counts nanoseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one vCPU works on."""

    first: int
    """Of its pages in the working set."""
    pages: int
    generations: int
    """Guest-physical address of its generation table."""
    fill_first: int
    """Of the pages that it fills at the start, counted from the start of the working set on into the rest."""
    fill_pages: int


class Plan:
    """The layout of one guest; the same for the same options and memory, on every host."""

    def __init__(self, options: SimOptions, ram: SimRam) -> None:
        self.options = options
        ranges = ram.ranges(USABLE // PAGE_SIZE)
        self.ram_pages = sum(count for _, count in ranges)
        default = 0 if options.workload is Work.IDLE else self.ram_pages * PAGE_SIZE // 2
        self.ws_pages = (default if options.ws is None else options.ws) // PAGE_SIZE
        if options.workload > Work.FILL and self.ws_pages < options.vcpus:
            raise UsageError("ws: the simulated guest needs at least a page for each vCPU")
        cuts = [self.ws_pages * cpu // options.vcpus for cpu in range(options.vcpus + 1)]
        check = options.workload is Work.CHECK
        tables = [-(-4 * (cuts[cpu + 1] - cuts[cpu]) // PAGE_SIZE) if check else 0 for cpu in range(options.vcpus)]
        self.gen_pages = sum(tables)
        self.gen_gpa = USABLE if check else 0
        if not ranges or self.gen_pages > ranges[0][1] or self.gen_pages + self.ws_pages > self.ram_pages:
            raise UsageError("ws does not fit the simulated guest's memory: a smaller ws= or more memory")
        ranges[0] = (ranges[0][0] + self.gen_pages, ranges[0][1] - self.gen_pages)
        self._starts = np.array([first for first, _ in ranges], dtype=np.int64)
        self._counts = np.cumsum([0] + [count for _, count in ranges])
        fill_size = self.ws_pages if options.fill_size is None else options.fill_size // PAGE_SIZE
        self.fill_pages = 0 if options.fill is Fill.NONE else fill_size
        if self.fill_pages > self.ram_pages - self.gen_pages:
            raise UsageError("fill_size does not fit the simulated guest's memory")
        # The checking workload brings its own content for the working set.
        skip = self.ws_pages if check else 0
        fills = max(0, self.fill_pages - skip)
        bounds = [skip + fills * cpu // options.vcpus for cpu in range(options.vcpus + 1)]
        self.shares = [
            Share(
                first=cuts[cpu],
                pages=cuts[cpu + 1] - cuts[cpu],
                generations=USABLE + sum(tables[:cpu]) * PAGE_SIZE,
                fill_first=bounds[cpu],
                fill_pages=bounds[cpu + 1] - bounds[cpu],
            )
            for cpu in range(options.vcpus)
        ]

    def frames(self, numbers: Frames) -> Frames:
        """Return the frames of pages of the working set (or, past its end, of the rest)."""
        which = np.searchsorted(self._counts, numbers, side="right") - 1
        frames: Frames = self._starts[which] + numbers - self._counts[which]
        return frames

    def write_status(self, ram: SimRam, tsc: int) -> None:
        """Fill in the status page and zero the control page and the vCPU blocks; the magic number comes last."""
        raw = ram.view(abi.STATUS_GPA, abi.SHARED_END - abi.STATUS_GPA)
        options = self.options
        with ram.stores(abi.STATUS_GPA, abi.SHARED_END - abi.STATUS_GPA):
            raw[:] = 0
            status = np.frombuffer(raw, abi.STATUS, 1)
            values = {
                "abi": abi.ABI,
                "image": abi.IMAGE,
                "state": abi.State.FILLING,
                "workload": options.workload,
                "write_mode": options.write,
                "fill": options.fill,
                "vcpus": options.vcpus,
                "tsc_khz": TSC_KHZ,
                "tsc_source": abi.Tsc.OPTION,
                "tick_us": options.tick_us,
                "slice_us": options.slice_us,
                "hot_writes": options.hot_writes,
                "hot_pages": options.hot_pages,
                "seed": options.seed,
                "rate_pages": options.rate_pages,
                "ram_pages": self.ram_pages,
                "ws_pages": self.ws_pages,
                "fill_pages": self.fill_pages,
                "gen_gpa": self.gen_gpa,
                "gen_pages": self.gen_pages,
                "boot_tsc": tsc,
                "message": b"simulated: there is no machine behind this guest",
                "cmdline": options.cmdline.encode()[:1023],
            }
            for name, value in values.items():
                status[name] = value
            ranges = self._ws_ranges()
            status["ws_ranges"] = len(ranges)
            for i, (first, count) in enumerate(ranges):
                status["ws"][0, i] = (first * PAGE_SIZE, count)
            status["magic"] = abi.STATUS_MAGIC

    def _ws_ranges(self) -> list[tuple[int, int]]:
        """Return (first frame, frames) of the working set's parts."""
        parts = []
        for start, low, high in zip(
            self._starts.tolist(), self._counts[:-1].tolist(), self._counts[1:].tolist(), strict=True
        ):
            if low < self.ws_pages and high > low:
                parts.append((start, min(high, self.ws_pages) - low))
        return parts[: abi.MAX_RANGES]
