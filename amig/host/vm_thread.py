"""The one thread on which a host makes blocking calls for its guest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from amig.aio import finish
from amig.errors import HostError

P = ParamSpec("P")
T = TypeVar("T")


class VmThread:
    """Runs blocking calls one after the other, off the event loop; owned by one guest."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"amig-vm-{name}")
        self._closed = False

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Queue a call; the future must be waited for to its end (`amig.control.waiting`)."""
        if self._closed:
            raise HostError("this guest's host is closed")
        loop = asyncio.get_running_loop()
        return asyncio.wrap_future(self._pool.submit(call, *args, **kwargs), loop=loop)

    async def call(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call and return its result. When cancelled, waits for the call to end, then raises that."""
        return await finish(self.submit(call, *args, **kwargs))

    def close(self) -> None:
        """End the thread; waits for what is queued. Idempotent."""
        self._closed = True
        self._pool.shutdown(wait=True)
