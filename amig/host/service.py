"""The host of one guest: its name, its control socket, its console, from the start to the end.

::

    async with HostService("web1") as service:                       amig run
        machine = await service.build(KvmMachine.boot, config, boot, sink=service.console.write)
        await service.start(machine)
        ended = await service.ended()

    async with HostService("web1") as service:                       amig receive
        incoming = service.incoming({"kvm": partial(KvmMachine.build_like, sink=service.console.write)})
        ...                                                          # fill it from a migration; incoming.run()
        ended = await service.ended()

Leaving the block ends everything: connections are closed and what they did is undone, the machine is closed, the name
is free. While the block lasts, clients can connect, also before there is a guest (state ``incoming``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from amig.aio import settle
from amig.control.server import ControlServer, Outbox
from amig.errors import AmigError, HostError
from amig.host.handover import Records
from amig.host.hosted import HostedGuest
from amig.host.incoming import Builder, LocalIncoming
from amig.host.life import Ended, How
from amig.host.local import LocalGuest, error_code
from amig.host.machine import Machine
from amig.host.names import NameLock
from amig.host.relay import ConsoleRelay, Sink
from amig.host.session import HostSession

P = ParamSpec("P")
M = TypeVar("M", bound=Machine)
_log = logging.getLogger(__name__)


class HostService:
    """Hosts one guest under a name. An async context manager, used once."""

    def __init__(self, name: str, *, sinks: tuple[Sink, ...] = (), records: Records | None = None) -> None:
        """``sinks`` get the serial port's output, on the guest's thread; ``records`` defaults to the user's own."""
        self.name = name
        self._sinks = sinks
        self._records = records or Records()

    async def __aenter__(self) -> HostService:
        """Take the name and listen.

        Raises `NameTaken`, `UsageError` (no such name is possible), and `HostError` while a handover of a guest of
        this name is in doubt: then nobody may start it here.
        """
        self._lock = NameLock.take(self.name)
        try:
            self._records.check_may_boot(self.name)
            self.hosted = HostedGuest(self.name, records=self._records)
            self.console = ConsoleRelay(self.hosted, self._sinks)
            try:
                self._server = ControlServer(self._lock.socket_path, self._session, error_code)
            except BaseException:
                self.hosted.vm.close()
                raise
        except BaseException:
            self._lock.close()
            raise
        self._serving = asyncio.create_task(self._server.serve(), name=f"amig-control-{self.name}")
        return self

    def _session(self, outbox: Outbox) -> HostSession:
        return HostSession(self.hosted, outbox, self.console)

    @property
    def socket_path(self) -> Path:
        """Where the control socket is."""
        return self._lock.socket_path

    async def build(self, make: Callable[P, M], *args: P.args, **kwargs: P.kwargs) -> M:
        """Build a machine off the event loop, on the thread that will own it; closed again if this is cancelled.

        Raises `HostError` where the guest of this name is on record as moved away: built anew there would be two of it.
        """
        self._records.check_may_start_anew(self.name)
        call = self.hosted.vm.submit(make, *args, **kwargs)
        cancelled = await settle(call)
        if cancelled is not None:
            if call.exception() is None:
                await self.hosted.vm.call(call.result().close)
            raise cancelled
        return call.result()

    async def start(self, machine: Machine, *, paused: bool = False) -> None:
        """Host a machine, ours from here, and let it run; ``paused`` as if an operator had paused it at once."""
        await self.hosted.adopt(machine)
        await self.hosted.start(paused=paused)

    def incoming(self, builders: Mapping[str, Builder]) -> LocalIncoming:
        """Return the destination of one migration to here; when that is discarded, another may be had."""
        return LocalIncoming(self.hosted, builders)

    def guest(self, name: str = "local") -> LocalGuest:
        """Return the guest as a migration in this very process sees it; raises `ControlError` before there is one."""
        return LocalGuest(self.hosted, name=name)

    async def ended(self) -> Ended:
        """Wait for the guest's end: switched off, stopped, moved away, or failed. Cancelling leaves it running."""
        loop = asyncio.get_running_loop()
        news: asyncio.Future[None] = loop.create_future()

        def wake(_: object) -> None:
            if not news.done():
                news.set_result(None)

        self.hosted.ended.add_done_callback(wake)
        self._serving.add_done_callback(wake)
        try:
            await news
        finally:
            self.hosted.ended.remove_done_callback(wake)
            self._serving.remove_done_callback(wake)
        if self.hosted.ended.done():
            return self.hosted.ended.result()
        self._serving.result()  # raises why
        raise HostError(f"the control socket of {self.name} was closed")

    async def stop(self, *, force: bool = False) -> None:
        """Stop the guest as an operator would: `ended` returns. Raises `ControlError` (``in-doubt``) after COMMIT.

        With ``force`` a handover in doubt stays on record, and this name is not started again before it is resolved.
        """
        await self.hosted.stop(force=force)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything, also when cancelled meanwhile."""
        closing = asyncio.ensure_future(self._close())
        cancelled = await settle(closing)
        if (failure := closing.exception()) is not None:
            if error is None:
                raise failure
            _log.error("closing the host of %s failed: %s", self.name, failure)
        if cancelled is not None:
            raise cancelled

    async def _close(self) -> None:
        try:
            self._serving.cancel()
            await asyncio.wait({self._serving})
            if not self._serving.cancelled() and (failure := self._serving.exception()) is not None:
                _log.error("the control socket of %s failed: %s", self.name, failure)
            self._server.close()
            await self.hosted.close()
        finally:
            self._lock.close()


async def host(
    name: str,
    make: Callable[[Sink], Machine],
    *,
    sinks: tuple[Sink, ...] = (),
    paused: bool = False,
    records: Records | None = None,
    ready: Callable[[HostService], None] = lambda service: None,
) -> Ended:
    """Host a guest from its start to its end: all of `amig run`.

    ``make`` builds the machine and gets the sink for its serial port; ``ready`` is called once the guest runs. Returns
    how it ended; a guest that FAILED raises that error. Cancelling ends the guest, unless a handover is in doubt: then
    the record keeps it from being started again.
    """
    async with HostService(name, sinks=sinks, records=records) as service:
        machine = await service.build(make, service.console.write)
        await service.start(machine, paused=paused)
        ready(service)
        ended = await service.ended()
    if ended.how is How.FAILED:
        raise ended.error or AmigError(ended.reason)
    return ended


__all__ = ["Ended", "HostService", "How", "host"]
