"""The source seeks its destination again after a lost connection."""

from __future__ import annotations

import asyncio
import time

from amig.errors import HostError, LinkLost, Refused
from amig.session.destination import Destination
from amig.stages.resumption import Answer

FIRST_PAUSE = 0.05
MAX_PAUSE = 2.0
"""Seconds between two tries."""


async def reconnect(destination: Destination, lost: LinkLost, *, since: int, round_: int, patience: float) -> Answer:
    """Try until the destination has answered what it has in place, for ``patience`` seconds.

    Raises `LinkLost` that names the loss and why there is no way back; `PeerError` and `Untrusted` at once.
    """
    until = time.monotonic() + patience
    pause = FIRST_PAUSE
    while True:
        try:
            async with asyncio.timeout(max(until - time.monotonic(), FIRST_PAUSE)):
                return await destination.resume(since, round_)
        except Refused as error:
            raise LinkLost(f"{lost}; connected again, and {error}") from error
        except (LinkLost, HostError, OSError, TimeoutError) as error:
            if time.monotonic() + pause > until:
                why = str(error) or "no answer"
                raise LinkLost(f"{lost}; sought again for {patience:g} s (--reconnect), at last: {why}") from error
        await asyncio.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE)
