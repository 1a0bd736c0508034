"""How often pages go twice, and why: the same strategies in the real hub, over the exact model of the kernel's log.

The search tells what can happen; this counts it. Pages leave one by one, one a tick, as over a link that is the
bottleneck, and are read as they leave; the guest writes at random meanwhile. So the last page of a chunk is read as
many ticks after its clear as the chunk is long: that is the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amig import bitmap
from amig.dirty.hub import DirtyLogHub, HubUser
from amig.dirty.log import LogAbilities
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot
from amig.sim.kernel_log import SimKernelLog
from amig.sim.proof.rules import DESIGNS, RING

COUNTED = tuple(name for name in DESIGNS if name not in (RING, "blind", "migration-bitmap"))
"""The ring needs a kernel; of designs that lose pages it makes no sense."""
CHUNKS = (2048, 512, 128, 32)


@dataclass(slots=True, kw_only=True)
class Copies:
    """Of one run; pages."""

    design: str
    chunk: int
    """Dirty pages that are cleared at once."""
    disturbed: bool
    """Whether there are a display, which looks at an eighth of memory once a round, and another source, which does
    every fourth write."""
    first: int = 0
    """Sent for the first time."""
    needed: int = 0
    """Sent again, and written after they had been read."""
    window: int = 0
    """Sent again, and written after they had been cleared, but before they were read."""
    needless: int = 0
    """Sent again without having been written since the clear."""


def count(design: str, chunk: int, *, disturbed: bool, pages: int = 8192, rounds: int = 6, rate: float = 0.7) -> Copies:
    """Run ``rounds`` rounds over ``pages`` pages, with ``rate`` writes for each page that is sent. Always the same."""
    size = pages * PAGE_SIZE
    here = MemoryMap(
        generation=1,
        regions=(Region(id=0, size=size),),
        slots=(Slot(index=0, guest_phys=0, size=size, region=0, offset=0),),
    )
    log = SimKernelLog(here, LogAbilities(manual_clear=True, initially_set=True))
    hub = DirtyLogHub(log, here)
    user = hub.open("migration", design)
    display = hub.open("display") if disturbed else None
    run = _Run(log, hub, user, Copies(design=design, chunk=chunk, disturbed=disturbed), pages, rate)
    for _ in range(rounds):
        run.round(display)
    return run.copies


class _Run:
    def __init__(
        self, log: SimKernelLog, hub: DirtyLogHub, user: HubUser, copies: Copies, pages: int, rate: float
    ) -> None:
        self.log, self.hub, self.user, self.copies, self.pages, self.rate = log, hub, user, copies, pages, rate
        self.random = np.random.default_rng(2019)
        self.now = 0.0
        self.written = np.full(pages, -1.0)
        self.cleared = np.full(pages, -1.0)
        self.read = np.full(pages, -1.0)

    def round(self, display: HubUser | None) -> None:
        """Send what is dirty."""
        began = self.now
        dirty = bitmap.to_pages(self.user.sync()[0])
        looked = display is None
        for at in range(0, len(dirty), self.copies.chunk):
            some = dirty[at : at + self.copies.chunk]
            self._chunk(int(some[0]), int(some[-1]) + 1, began)
            if display is not None and not looked and 2 * at >= len(dirty):
                display.sync()
                display.take_and_clear(0, self.pages - self.pages // 8, self.pages // 8, 1)
                looked = True

    def _chunk(self, first: int, end: int, began: float) -> None:
        sent = bitmap.to_pages(self.user.take_and_clear(0, first, end - first, 1), first)
        known = sent[self.read[sent] >= 0]
        needed = self.written[known] > self.read[known]
        window = ~needed & (self.written[known] > self.cleared[known])
        self.copies.first += len(sent) - len(known)
        self.copies.needed += int(needed.sum())
        self.copies.window += int(window.sum())
        self.copies.needless += int((~needed & ~window).sum())
        # Auto-clear has cleared them when the round began.
        self.cleared[sent] = began if self.copies.design == "auto-clear" else self.now
        self.read[sent] = self.now + np.arange(len(sent))
        number = int(len(sent) * self.rate)
        pages = self.random.integers(0, self.pages, number)
        when = self.now + np.sort(self.random.uniform(0, len(sent), number))
        self.written[pages] = when  # in order: the last write to a page stands
        outside = (np.arange(number) % 4 == 3) & self.copies.disturbed
        self.log.guest_write(0, pages[~outside])
        for page in pages[outside].tolist():
            self.hub.mark(0, page, 1)
        self.now += len(sent)
