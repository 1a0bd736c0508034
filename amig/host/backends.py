"""Device backends in other processes, which write guest memory by themselves: who they are, when they rest, their log.

As with vhost-user, the host does not see what they write: they say so in a shared log. When the guest is paused they
are told to stop, and the pause is complete when the last of them has said that it did; what they have logged by then is
in the sync that follows. Owned by one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from amig.dirty.hub import DirtyLogHub
from amig.dirty.vhost import VhostLog
from amig.errors import ControlError
from amig.host.vm_thread import VmThread
from amig.memory import MemoryMap

MAX_BACKENDS = 32
STOP_TIMEOUT = 5.0
"""Seconds that a backend has to come to rest."""
_log = logging.getLogger(__name__)


class Backend:
    """One of them. ``tell`` must not block: with 0 it lets it run, with a number asks it to stop and repeat that."""

    def __init__(self, name: str, tell: Callable[[int], None]) -> None:
        self.name = name
        self.tell = tell
        self.rests = asyncio.Event()
        self.asked = 0
        """The number of the stop that was asked for last; 0 once it runs again."""

    def stopped(self, number: int) -> None:
        """It has done what it was asked by that number; what it says of an earlier time counts for nothing."""
        if number and number == self.asked:
            self.rests.set()


class Backends:
    """All backends of one guest."""

    def __init__(self, hub: DirtyLogHub, memory_map: MemoryMap, vm: VmThread) -> None:
        """Calls that wait for the hub are made on ``vm``."""
        self.running = False
        self._hub = hub
        self._map = memory_map
        self._vm = vm
        self._all: list[Backend] = []
        self._shared: VhostLog | None = None
        self._making = asyncio.Lock()
        self._stops = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Who is attached."""
        return tuple(backend.name for backend in self._all)

    async def attach(self, backend: Backend) -> VhostLog:
        """Take one in; it may write from now on, if ``running``. Raises `ControlError`, `HostError`."""
        async with self._making:
            if len(self._all) >= MAX_BACKENDS:
                raise ControlError(f"this guest has {MAX_BACKENDS} device backends already", code="busy")
            if self._shared is None:
                self._shared = await self._vm.call(self._make)
            if not self.running:
                backend.rests.set()
            self._all.append(backend)
            return self._shared

    def _make(self) -> VhostLog:
        made = VhostLog(self._map)
        self._hub.attach(made)
        return made

    async def leave(self, backend: Backend, *, in_order: bool) -> None:
        """Let one go. Unless it went ``in_order`` it may have written and not logged: all memory counts as written."""
        if backend not in self._all:
            return
        self._all.remove(backend)
        try:
            if not in_order:
                _log.warning("device backend %s has gone without a word: all memory counts as written", backend.name)
                await self._vm.call(self._suspect_all)
        finally:
            backend.rests.set()  # not before: a pause that waits for it must find the marks

    def _suspect_all(self) -> None:
        for region in self._map.regions:
            self._hub.mark(region.id, 0, region.pages)

    async def stop(self) -> None:
        """Have all of them rest. Raises `ControlError` (``backend``) when one does not; they are to run again then."""
        self.running = False
        busy = [backend for backend in self._all if not backend.rests.is_set()]
        for backend in busy:
            self._stops += 1
            backend.asked = self._stops
            backend.tell(self._stops)
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                for backend in busy:
                    await backend.rests.wait()
        except TimeoutError:
            stuck = ", ".join(backend.name for backend in busy if not backend.rests.is_set())
            raise ControlError(
                f"device backend {stuck} did not stop within {STOP_TIMEOUT:g} s: the guest can't be paused",
                code="backend",
            ) from None

    def run(self) -> None:
        """Let all of them write again; no-op when they do."""
        if self.running:
            return
        self.running = True
        for backend in self._all:
            backend.rests.clear()
            backend.asked = 0
            backend.tell(0)

    def close(self) -> None:
        """Give the log back; the guest has ended."""
        if self._shared is not None:
            self._hub.detach(self._shared)
            self._shared.close()
            self._shared = None
