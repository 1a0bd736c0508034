"""Whether a connection is still one: pings when nothing moves, and an end to waiting when nothing ever will.

What counts as life is any byte that came, that our kernel took, or that the peer's kernel acknowledged. A link that is
slow, capped or full moves some, now and then; on one that is idle the answer to a ping moves. No second ping goes out
before something has come after the first, so that pings which nobody answers are no sign of life.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from amig.errors import LinkLost
from amig.transport.framed import FramedConnection
from amig.wire.frametype import FrameType
from amig.wire.messages import Ping


async def keep_alive(
    links: Sequence[FramedConnection], *, every: float, limit: float, while_: Callable[[], bool] = lambda: True
) -> None:
    """Watch the connections of a migration until cancelled; raises `LinkLost` once nothing moved for ``limit`` seconds.

    A ping goes out on the first of them when nothing has moved for ``every`` seconds. Nothing is expected, and nothing
    sent, unless ``while_()``. Time is counted in looks, so that a process which was itself held up accuses nobody.
    """
    tick = min(every, limit / 4)
    most, idle, seq = math.ceil(limit / tick), 0, 0
    seen: list[tuple[int, int, int | None]] = []
    pinged = False
    asked = -1
    ping: asyncio.Task[int] | None = None
    try:
        while True:
            await asyncio.sleep(tick)
            signs = [_signs(link) for link in links]
            if pinged and ping is not None and ping.done() and not ping.cancelled() and ping.exception() is None:
                # Our own question is no sign of life, or silence would be noticed later by as long as it took to ask.
                if signs[1:] == seen[1:] and _but_for(ping.result(), seen[0], signs[0]):
                    seen = signs
                pinged = False
            if signs != seen or not while_():
                seen, idle = signs, 0
                continue
            idle += 1
            if idle >= most:
                raise LinkLost(
                    f"nothing has come from {links[0].peer} or gone there for {limit:g} s (--stall waits longer)"
                )
            came = links[0].connection.bytes_received
            if came != asked and (ping is None or ping.done()) and _quiet(links[0]):
                asked = came
                seq += 1
                message = Ping(seq=seq, sent_ns=time.monotonic_ns())
                ping = asyncio.ensure_future(links[0].send_message(message))
                ping.add_done_callback(_looked_at)
                pinged = True
    finally:
        if ping is not None:
            ping.cancel()


def _signs(link: FramedConnection) -> tuple[int, int, int | None]:
    connection = link.connection
    return connection.bytes_received, connection.bytes_sent, connection.outstanding()


def _but_for(size: int, before: tuple[int, int, int | None], now: tuple[int, int, int | None]) -> bool:
    """Whether nothing has moved but so many bytes of ours, acknowledged or not."""
    return now[:2] == (before[0], before[1] + size) and (now[2] or 0) in ((before[2] or 0), (before[2] or 0) + size)


def _quiet(link: FramedConnection) -> bool:
    """Whether a ping could go now: nothing else waits to, so it is never cut off in its middle."""
    protocol = link.protocol
    return (protocol is None or protocol.may_send(FrameType.PING)) and not link.connection.outstanding()


def _looked_at(ping: asyncio.Task[int]) -> None:
    if not ping.cancelled():
        ping.exception()  # whoever reads the connection sees its end, and says why
