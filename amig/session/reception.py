"""`Reception`: waits for a guest and runs it; all of ``amig receive``, as a service embeds it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType

from amig.aio import settle
from amig.errors import AmigError, HostError, PeerError, UsageError
from amig.host.hosted import Ended, How
from amig.host.kvm_machine import KvmMachine
from amig.host.local import Builder
from amig.host.relay import Sink
from amig.host.service import HostService
from amig.host.stock import MemoryStock
from amig.policy import KEEPALIVE, MAX_KEPT, STALL
from amig.session.inbound import Inbound, Phase
from amig.session.questions import HostRecords, WasAsked, attend
from amig.session.release import RELEASE
from amig.session.restore import restore
from amig.sim.guest import SimMachine
from amig.transport import Connection, LinkOptions, Listener, listen
from amig.transport.address import TlsAddress, parse_socket
from amig.transport.pairing import PairingHost, PairingListener
from amig.transport.stdio import StdioListener
from amig.wire.messages import Hello

KEEP = 60.0
"""Seconds: as long as a source seeks, and as it may need more than this side to notice that a connection is lost."""
_log = logging.getLogger(__name__)


def builders(service: HostService, stock: MemoryStock, *, dirty_ring: int = 0) -> Mapping[str, Builder]:
    """Return what builds the machine of an arriving guest, by engine; its memory comes from ``stock``.

    With ``dirty_ring``, bytes of each vCPU's ring, guests are logged that way; simulated ones can't be, and are none.
    """
    sink = service.console.write
    kvm = partial(KvmMachine.build_like, make_memory=stock.make, sink=sink, dirty_ring=dirty_ring)
    if dirty_ring:
        return {"kvm": kvm}
    return {"kvm": kvm, "simulator": partial(SimMachine.build_like, make_memory=stock.make, serial=sink)}


class Reception:
    """Hosts the guest that arrives at an address.

    ::

        async with amig.Reception("tls://0.0.0.0:7000", name="web1") as reception:
            print(reception.address)            # with the real port
            await reception.arrived()           # it runs here
            ended = await reception.ended()     # it was switched off, stopped, or moved on

    From entering to leaving the name is taken and its control socket answers, with state ``incoming`` at first. An
    attempt that fails is discarded and the next one is waited for; with ``once`` it is raised. Leaving the block stops
    the guest if it runs.

    With ``pairing`` (docs/security.md) nothing needs to be set up on either side: `invitation` is an address with a
    secret for one use, to be shown to whoever starts the migration. It admits one source, so one attempt is all there
    is, as with ``once``.

    With ``memory`` so many bytes of guest memory are backed before the address is known, and again after an attempt
    that used them up. A guest of up to that size is written straight into them; a larger one gets memory as without.
    """

    def __init__(
        self,
        address: str | Listener,
        *,
        name: str,
        sinks: tuple[Sink, ...] = (),
        once: bool = False,
        link: LinkOptions | None = None,
        pairing: PairingHost | None = None,
        hugepages: bool = False,
        workers: int = 1,
        memory: int = 0,
        max_memory: int = 0,
        dirty_ring: int = 0,
        keep: float = KEEP,
        keepalive: float = KEEPALIVE,
        stall: float = STALL,
        on_phase: Callable[[Phase], None] = lambda _: None,
        on_failure: Callable[[AmigError], None] = lambda _: None,
        on_note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``workers`` threads decompress; ``on_failure`` hears of attempts that failed, ``on_note`` of other news.

        ``link`` has the certificates for ``tls://``, and says whether plain TCP is accepted from elsewhere. A guest
        with more than ``max_memory`` bytes is refused (0: none is); ``dirty_ring`` is the bytes of each vCPU's ring,
        0 for bitmaps. For ``keep`` seconds what came over a lost connection is kept for a source that comes back (0:
        not at all); a connection on which nothing moves is asked for a sign of life after ``keepalive`` seconds, and
        counts as lost after ``stall``. Raises `UsageError` for sizes and times that can't be.
        """
        self._where = address
        self._link = link
        self._pairing = pairing
        self._name = name
        self._sinks = sinks
        self._once = once or pairing is not None
        self._dirty_ring = dirty_ring
        if not 0 <= keep <= MAX_KEPT or keepalive <= 0 or stall <= 0:
            raise UsageError("what is received is kept between 0 and 1 day, and keep-alive and stall are above 0")
        self._keep, self._keepalive, self._stall = keep, keepalive, stall
        self._stock = MemoryStock(ahead=memory, limit=max_memory, hugepages=hugepages, tell=self._note)
        self._workers = workers
        self._on_phase = on_phase
        self._on_failure = on_failure
        self._on_note = on_note
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: Listener | None = None
        self._serving: asyncio.Task[None] | None = None
        self._answering: asyncio.Task[None] | None = None
        self.service = HostService(name, sinks=sinks)

    @property
    def address(self) -> str:
        """Where it listens, with the real port."""
        if self._listener is None:
            raise UsageError("enter the reception first: async with amig.Reception(…) as reception")
        return self._listener.address

    @property
    def invitation(self) -> str:
        """The address for the other side. With ``pairing`` there is a secret in it: show it, but keep it nowhere."""
        if isinstance(self._listener, PairingListener):
            return self._listener.invitation().reveal()
        return self.address

    async def __aenter__(self) -> Reception:
        self._loop = asyncio.get_running_loop()
        await self.service.__aenter__()
        try:
            await self._prepare()
            self._listener = await self._listen()
        except BaseException as error:
            self._stock.close()
            await self.service.__aexit__(type(error), error, error.__traceback__)
            raise
        self._serving = asyncio.create_task(self._serve(self._listener), name=f"amig-reception-{self._name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._serving is not None  # noqa: S101 - entered
        assert self._listener is not None  # noqa: S101 - entered
        self._serving.cancel()
        try:
            await asyncio.wait([self._serving])
            if self._answering is not None:
                self._answering.cancel()
                await asyncio.wait([self._answering])
        finally:
            self._stock.close()
            await self._listener.close()
            await self.service.__aexit__(kind, error, trace)

    async def _prepare(self) -> None:
        """Have memory for the next guest backed. Cancelling leaves the rest for the next call."""
        if not self._stock.ahead:
            return
        stop = threading.Event()
        work = asyncio.ensure_future(asyncio.to_thread(self._stock.prepare, stop))
        try:
            await asyncio.shield(work)
        finally:
            stop.set()
            cancelled = await settle(work)
            work.exception()  # looked at: who was cancelled does not hear of it
            if cancelled is not None:
                raise cancelled

    async def _prepare_again(self) -> None:
        try:
            await self._prepare()
        except AmigError as error:
            self._on_note(f"no memory is prepared for the next guest: {error}")

    async def _accept(self, listener: Listener) -> Connection:
        """Return the next connection; meanwhile memory is prepared, if the last attempt used it up."""
        preparing = asyncio.create_task(self._prepare_again())
        connection: Connection | None = None
        try:
            connection = await listener.accept()
        finally:
            preparing.cancel()
            cancelled = await settle(preparing)
            if cancelled is not None:
                if connection is not None:
                    connection.abort()
                raise cancelled
        return connection

    def _note(self, text: str) -> None:
        """Pass a note on, from whatever thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._on_note, text)

    async def _listen(self) -> Listener:
        if not isinstance(self._where, str):
            return self._where
        if self._pairing is None:
            return await listen(self._where, self._link)
        where = parse_socket(self._where)
        if not isinstance(where, TlsAddress):
            raise UsageError(f"pairing needs tls://HOST:PORT to listen on, not {where}")
        return await self._pairing.listen(where)

    async def arrived(self) -> None:
        """Wait until a guest runs here. Raises the attempt's error with ``once``, else waits for the next attempt.

        Raises `HostError` when an operator stops the host before.
        """
        if not await self._arrived():
            raise HostError(f"the host of {self._name} was stopped before a guest arrived")

    async def _arrived(self) -> bool:
        """Return whether a guest arrived; False when the host was stopped before."""
        assert self._serving is not None  # noqa: S101 - entered
        ended = asyncio.ensure_future(self.service.ended())
        try:
            await asyncio.wait([self._serving, ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if not self._serving.done():
            return False
        self._serving.result()
        return True

    async def ended(self) -> Ended:
        """Wait until the guest that arrived has ended, or its host before. A guest that FAILED raises its error."""
        await self._arrived()
        ended = await self.service.ended()
        if ended.how is How.FAILED and ended.error is not None:
            raise ended.error
        return ended

    async def _serve(self, listener: Listener) -> None:
        while True:
            connection = await self._accept(listener)
            try:
                await self._attempt(connection, listener)
            except WasAsked as asked:
                _log.info("%s", asked)
                if isinstance(listener, StdioListener):
                    raise
            except AmigError as error:
                self._on_failure(error)
                if self._once:
                    raise
                _log.warning("a migration to %s failed, waiting for the next: %s", self._name, error)
            else:
                return

    async def _answer(self, inbound: Inbound, listener: Listener) -> None:
        """The guest runs here: listen on until the source has that on record, since it may have lost our word."""
        try:
            if not await inbound.confirmed():
                await attend(
                    listener, HostRecords(self.service.hosted.records), until=lambda answered: answered.confirmed
                )
        except AmigError as error:
            _log.warning("nobody can ask any more what became of migration %s: %s", inbound.migration, error)
        finally:
            with contextlib.suppress(AmigError):
                await inbound.close()
            await listener.close()

    def _admit(self, hello: Hello) -> None:
        self._stock.admit(hello.name, hello.memory, hello.memory_used)

    async def _attempt(self, connection: Connection, listener: Listener) -> None:
        inbound = Inbound(
            connection,
            None if isinstance(listener, StdioListener) else listener,
            self.service.incoming(builders(self.service, self._stock, dirty_ring=self._dirty_ring)),
            release=RELEASE,
            name=self._name,
            workers=self._workers,
            keep=self._keep,
            keepalive=self._keepalive,
            stall=self._stall,
            on_phase=self._on_phase,
            admit=self._admit,
            records=HostRecords(self.service.hosted.records),
        )
        try:
            await inbound.run()
        except BaseException as error:
            with contextlib.suppress(AmigError):
                await inbound.close()
            if isinstance(error, OSError | ValueError):
                raise PeerError(f"the migration failed here: {error}") from error
            raise
        self._answering = asyncio.create_task(self._answer(inbound, listener), name=f"amig-answers-{self._name}")


async def receive(
    address: str,
    *,
    name: str,
    sinks: tuple[Sink, ...] = (),
    once: bool = False,
    link: LinkOptions | None = None,
    listening: Callable[[str], None] = lambda _: None,
) -> Ended:
    """Wait for a guest at ``address``, run it, and return how it ended: a `Reception` in one call.

    ``listening`` is called with the address, the real port in it, once a source may come. Cancelling stops waiting, or
    the guest if it has arrived. Raises what `Reception` raises.
    """
    async with Reception(address, name=name, sinks=sinks, once=once, link=link) as reception:
        listening(reception.address)
        return await reception.ended()


async def restore_here(service: HostService, path: str, *, hugepages: bool = False, workers: int = 1) -> None:
    """Fill the service's guest from a snapshot and run it: all of ``amig run NAME --restore file:PATH``."""
    incoming = service.incoming(builders(service, MemoryStock(hugepages=hugepages)))
    await restore(path, incoming, name=service.name, workers=workers)
    restored = uuid.uuid4().hex  # each is a guest of its own, and no migration that anybody asks for
    await incoming.commit(restored)
    await incoming.run()
    await incoming.settle()
    await service.hosted.vm.call(service.hosted.records.settled, restored)
