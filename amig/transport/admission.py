"""A listener that lets only those in who prove what they must.

Proofs take round trips, so they run side by side and each has a time limit: whoever connects and says nothing holds up
nobody. There are only so many places for strangers; when they are full, the one that has been there longest goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from amig.errors import AmigError, HostError, LinkLost
from amig.transport.listener import SocketListener
from amig.transport.sock import SocketConnection

C = TypeVar("C", bound=SocketConnection)

ADMISSION_TIMEOUT: Final = 10.0
"""Seconds that a stranger has for its proof."""
MAX_STRANGERS: Final = 32
MAX_REPORTS: Final = 20
"""Refusals that are logged; more are only counted."""
_log = logging.getLogger(__name__)


class AdmittingListener(Generic[C]):
    """`Listener` over another, which it owns. ``admit`` raises an `AmigError` for those who stay outside."""

    def __init__(
        self,
        listener: SocketListener[C],
        admit: Callable[[C], Awaitable[None]],
        *,
        over: Callable[[], AmigError | None] = lambda: None,
        timeout: float = ADMISSION_TIMEOUT,
    ) -> None:
        """``over`` tells why nobody can come any more; it is asked after each refusal and once a second."""
        self._listener = listener
        self._admit = admit
        self._over = over
        self._timeout = timeout
        self._accepting: asyncio.Task[C] | None = None
        self._strangers: dict[asyncio.Task[None], C] = {}
        self._admitted: deque[C] = deque()
        self._closed = False
        self.refused = 0
        """How many stayed outside."""

    @property
    def address(self) -> str:
        """Where it listens, with the real port."""
        return self._listener.address

    async def accept(self) -> C:
        """Return the next connection that was let in; cancelling loses none.

        Raises `HostError` once closed, and what ``over`` says when there is no point in waiting.
        """
        while not self._closed:
            if self._admitted:
                return self._admitted.popleft()
            if (reason := self._over()) is not None:
                raise reason
            if self._accepting is None:
                self._accepting = asyncio.create_task(self._listener.accept(), name=f"amig-accept-{self.address}")
            await asyncio.wait({self._accepting, *self._strangers}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            if self._accepting is not None and self._accepting.done():
                done, self._accepting = self._accepting, None
                self._begin(done.result())
            self._sort()
        raise HostError(f"the listener on {self.address} is closed")

    async def close(self) -> None:
        """Stop listening; who has been let in lives on, strangers are dropped."""
        if self._closed:
            return
        self._closed = True
        tasks: list[asyncio.Task[C] | asyncio.Task[None]] = [*self._strangers]
        accepting, self._accepting = self._accepting, None
        if accepting is not None:
            tasks.append(accepting)
        for task in tasks:
            task.cancel()
        await self._listener.close()
        if tasks:
            await asyncio.wait(tasks)
        for connection in (*self._strangers.values(), *self._admitted):
            connection.abort()
        self._strangers.clear()
        self._admitted.clear()
        if accepting is not None and not accepting.cancelled():
            with contextlib.suppress(AmigError):
                accepting.result().abort()

    def _begin(self, connection: C) -> None:
        staying = [task for task in self._strangers if not task.done() and not task.cancelling()]
        if len(staying) >= MAX_STRANGERS:
            staying[0].cancel()
        task = asyncio.create_task(self._prove(connection), name=f"amig-admit-{connection.peer}")
        self._strangers[task] = connection

    async def _prove(self, connection: C) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._admit(connection)
        except TimeoutError:
            raise LinkLost(f"{connection.peer} did not prove who it is within {self._timeout:g} s") from None
        except AmigError:
            # It may still be sending; dropped now, the kernel would throw away our alert, which says why.
            await connection.close()
            raise

    def _sort(self) -> None:
        for task in [task for task in self._strangers if task.done()]:
            connection = self._strangers.pop(task)
            error = None if task.cancelled() else task.exception()
            if task.cancelled() or error is not None:
                connection.abort()
                self._report(connection.peer, error)
                if error is not None and not isinstance(error, AmigError):
                    raise error
            else:
                self._admitted.append(connection)

    def _report(self, peer: str, error: BaseException | None) -> None:
        self.refused += 1
        if self.refused <= MAX_REPORTS:
            _log.warning("%s was not let in: %s", peer, error or "others came, and it had not said who it is")
        if self.refused == MAX_REPORTS:
            _log.warning("further ones that are not let in at %s are not reported", self.address)
