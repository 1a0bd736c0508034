"""Memory that is backed ahead of the pages that will come: while they are on their way, not when they are there.

Fresh memory costs 2 us a page and more, most of a first round's time. The first round comes in ascending order, so
where its last pages lay one after another the next ones are likely to follow: a thread backs them meanwhile. What it
backed in vain is given back at the end of the round.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from amig import bitmap
from amig.errors import AmigError
from amig.memory import WORD_PAGES, Region, Words
from amig.promptness import be_patient

AHEAD_PAGES = 8192
"""How far ahead of the pages that came: 32 MiB."""
STEP_PAGES = 2048
"""Most pages backed by one call."""


class BackingAhead:
    """Decides on the event loop's thread what a thread of its own backs."""

    def __init__(self, regions: Iterable[Region], populate: Callable[[int, int, int], bool]) -> None:
        """``populate(region, first page, pages)`` is `amig.guest.Incoming.populate`."""
        self._pages = {region.id: region.pages for region in regions}
        self._populate = populate
        self._thread = ThreadPoolExecutor(1, "amig-populate", initializer=be_patient)
        self._work: Future[None] | None = None
        self.needed = True
        """Whether there may be memory here that is not backed yet."""
        self._region = -1
        self._next = 0
        self._backed = {region: bitmap.zeros(pages) for region, pages in self._pages.items()}

    def came(self, region: int, first: int, end: int) -> None:
        """Pages ``first`` to ``end`` (not included) have come, without a gap: back some of what follows them."""
        if not self.needed or (self._work is not None and not self._work.done()):
            return
        if region != self._region or not first <= self._next <= end + AHEAD_PAGES:
            self._region, self._next = region, end
        start = max(self._next, end)
        count = min(STEP_PAGES, end + AHEAD_PAGES - start, self._pages[region] - start)
        if count > 0:
            bitmap.set_range(self._backed[region], start, count)
            self._next = start + count
            self._work = self._thread.submit(self._back, region, start, count)

    def missing(self, region: int, first: int, fresh: Words) -> Words:
        """Return which of the pages set in ``fresh`` (bit 0 is page ``first``) were not backed ahead."""
        return fresh & ~self._backed[region][first // WORD_PAGES : first // WORD_PAGES + len(fresh)]

    async def backed(self) -> dict[int, Words]:
        """Wait until nothing is being backed; return which pages have been by now, by region."""
        if self._work is not None:
            await asyncio.wait({asyncio.wrap_future(self._work)})
        return self._backed if self.needed else {}

    def close(self) -> None:
        """Wait for the thread; the memory may be unmapped then. Idempotent."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _back(self, region: int, first: int, count: int) -> None:
        with contextlib.suppress(AmigError):  # whoever needs the pages will hear of it
            self.needed = self._populate(region, first, count)
