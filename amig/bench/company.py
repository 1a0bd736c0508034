"""Who else uses a guest's dirty log, or writes its memory, while it is being moved."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from amig.dirty.meter import DirtyMeter
from amig.errors import AmigError
from amig.host.attach import open_control, open_guest
from amig.memory import WORD_PAGES

PERIOD = 0.02
"""Seconds of a sample of the meter."""
DRAWING = 0.005
"""Seconds that the display takes between learning what is dirty and taking it."""
WRITES = 0.005
"""Seconds between two writes from the host's side."""


@dataclass(slots=True, kw_only=True)
class Company:
    """What they did."""

    samples: int = 0
    looks: int = 0
    host_writes: int = 0
    """The number that was written last, where the host says that it has been."""
    trouble: list[str] = field(default_factory=list)


async def meter(socket: str, told: Company) -> None:
    """Measure the dirty rate until the guest has gone."""
    guest = await open_guest(socket, client="bench meter")
    try:
        async with DirtyMeter(guest) as measuring:
            async for _ in measuring.samples(PERIOD, 3600):
                told.samples += 1
    finally:
        await guest.close()


async def display(socket: str, region: int, first: int, pages: int, told: Company) -> None:
    """Look at a range again and again, slowly: what it takes, it has been told of some time before.

    So does a display that draws a frame between asking what is dirty and saying what it has drawn.
    """
    guest = await open_guest(socket, client="bench display")
    first -= first % WORD_PAGES
    pages -= pages % WORD_PAGES
    try:
        await guest.log_start(None)
        while True:
            await guest.sync()
            await asyncio.sleep(DRAWING)
            await guest.take_and_clear(region, first, pages)
            told.looks += 1
    finally:
        await guest.close()


async def host_writes(socket: str, told: Company) -> None:
    """Have the host write the guest's control page until it does not any more."""
    async with await open_control(socket, client="bench host writes") as control:
        while True:
            told.host_writes = await control.ask_guest("gap-reset")
            await asyncio.sleep(WRITES)


@asynccontextmanager
async def keeping(*people: asyncio.Task[None], told: Company) -> AsyncIterator[None]:
    """Let them go about their business for the length of the block; a guest that goes is no trouble to them."""
    try:
        yield
    finally:
        for one in people:
            one.cancel()
        if people:
            await asyncio.wait(people)
        for one in people:
            with contextlib.suppress(asyncio.CancelledError):
                error = one.exception()
                if error is not None and not isinstance(error, AmigError):
                    raise error
                if error is not None and not _gone(error):
                    told.trouble.append(f"{one.get_name()}: {error}")


def _gone(error: BaseException) -> bool:
    return getattr(error, "code", "") in ("closed", "wrong-state", "not-a-user")
