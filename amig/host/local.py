"""A guest in this very process: `amig.guest.Guest` and `amig.guest.Incoming` without a socket between.

The server gives each connection a `LocalGuest`, so that what happens when one ends is written once.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from amig.control.take import check_range
from amig.control.types import Progress
from amig.control.waiting import finish, settle
from amig.dirty.hub import HubUser
from amig.errors import AmigError, ControlError, GuestError, KvmError, Refused, UsageError, VerifyFailed
from amig.guest import GuestInfo, Handover, LogStarted, Outcome, RunState
from amig.host.handover import ArrivalRecord
from amig.host.hosted import HostedGuest, MachineEnvelope
from amig.host.machine import Machine
from amig.memory import WORD_PAGES, GuestMemory, MemoryMap, Pages, Words


def error_code(error: AmigError) -> str:
    """Return the guest protocol's word for an error."""
    match error:
        case ControlError():
            return error.code
        case KvmError():
            return "kvm"
        case GuestError():
            return "guest"
        case UsageError():
            return "usage"
        case _:
            return "error"


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turn every error of the host into the `ControlError` that a client over the socket would see."""
    try:
        yield
    except ControlError:
        raise
    except AmigError as error:
        raise ControlError(str(error), code=error_code(error)) from error


class LocalGuest:
    """Implements `amig.guest.Guest` for a guest hosted in this process; one user of it. Always `close` it."""

    def __init__(self, hosted: HostedGuest, *, name: str = "local") -> None:
        self.name = name[:256]
        self.cancel_requested = asyncio.Event()
        """Set when an operator asks for the migration that `migration_begin` registered to be cancelled."""
        self.on_cancel: Callable[[str], None] | None = None
        self._hosted = hosted
        self._info = hosted.info()
        self._memory = hosted.machine.memory
        self._user: HubUser | None = None
        self._generation = 0
        self._closed = False

    @property
    def info(self) -> GuestInfo:
        """As it was when this object was made."""
        return self._info

    @property
    def memory(self) -> GuestMemory:
        """Live memory; not to be written here."""
        return self._memory

    # --- the dirty log -----------------------------------------------------------------------------------------------

    async def log_start(self, strategy: str | None) -> LogStarted:
        """See `amig.guest.Guest.log_start`; refused with ``already-on`` when this object is a user already."""
        self._check_open()
        if self._user is not None:
            raise ControlError("this connection is a user of the dirty log already", code="already-on")
        self._hosted.require("be migrated", RunState.RUNNING, RunState.PAUSED)
        with refusing():
            return await self._hosted.vm.call(self._open, strategy)

    def _open(self, strategy: str | None) -> LogStarted:
        user = self._hosted.hub.open(self.name, strategy)
        try:
            started = user.started
        except BaseException:
            user.close()
            raise
        self._user, self._generation = user, started.generation
        return started

    @property
    def log_user(self) -> HubUser:
        """Our user of the hub, for a thread that takes on its behalf; raises `ControlError` (``not-a-user``)."""
        if self._user is None:
            raise ControlError("this connection is no user of the dirty log: log_start comes first", code="not-a-user")
        return self._user

    async def sync(self) -> Mapping[int, Words]:
        """See `amig.guest.Guest.sync`; the arrays can't be written."""
        user = self.log_user
        with refusing():
            found = await self._hosted.vm.call(user.sync)
        return {region: _frozen(words) for region, words in found.items()}

    async def sync_into(self, into: Mapping[int, Words]) -> None:
        """As `sync`, but leave the bits in arrays of the caller."""
        user = self.log_user
        with refusing():
            await self._hosted.vm.call(user.sync, into)

    async def take_and_clear(self, region: int, first: int, count: int) -> Words:
        """See `amig.guest.Guest.take_and_clear`; the words can't be written."""
        user = self.log_user
        with refusing():
            check_range(self._info.memory, region, first, count)
            call = self._hosted.vm.submit(user.take_and_clear, region, first, count, self._generation)
            cancelled = await settle(call)
            if cancelled is not None:
                if call.exception() is None:
                    await finish(self._hosted.vm.submit(user.give_back, region, first, call.result()))
                raise cancelled
            return _frozen(call.result())

    async def give_back(self, region: int, first: int, taken: Words) -> None:
        """See `amig.guest.Guest.give_back`."""
        user = self.log_user
        with refusing():
            pages = self._info.memory.region(region).pages
            check_range(self._info.memory, region, first, min(len(taken) * WORD_PAGES, pages - first))
            await self._hosted.vm.call(user.give_back, region, first, taken)

    async def log_stop(self) -> None:
        """See `amig.guest.Guest.log_stop`."""
        user, self._user = self._user, None
        if user is not None:
            with refusing():
                await self._hosted.vm.call(user.close)

    # --- run state, handover -----------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """See `amig.guest.Guest.pause`; refused with ``busy`` while another migrates the guest."""
        self._check_open()
        with refusing():
            await self._hosted.pause(self)

    async def resume(self) -> None:
        """See `amig.guest.Guest.resume`."""
        with refusing():
            await self._hosted.resume(self)

    async def save(self) -> bytes:
        """See `amig.guest.Guest.save`."""
        with refusing():
            return await self._hosted.save(self)

    async def prepare(self, handover: Handover) -> None:
        """See `amig.guest.Guest.prepare`."""
        self._check_open()
        with refusing():
            await self._hosted.prepare(self, handover)

    async def commit(self, migration: str) -> None:
        """See `amig.guest.Guest.commit`."""
        with refusing():
            await self._hosted.commit(self, migration)

    async def release(self, migration: str, outcome: Outcome) -> None:
        """See `amig.guest.Guest.release`."""
        with refusing():
            await self._hosted.release(migration, outcome)

    # --- what others may see of this migration -----------------------------------------------------------------------

    async def migration_begin(self, migration: str, destination: str) -> None:
        """Claim the guest: refused with ``busy`` when another migrates it."""
        self._check_open()
        self.cancel_requested.clear()
        self._hosted.begin_migration(self, migration, destination)

    def migration_progress(self, progress: Progress) -> None:
        """Show figures to whoever asks the host; never waits."""
        if self._hosted.migration is not None and self._hosted.migration.owner is self:
            self._hosted.migration.progress = progress

    async def migration_end(self, status: str, error: str = "") -> None:
        """Say how it ended: ``completed``, ``cancelled`` or ``failed``."""
        self._hosted.end_migration(self, status, error)

    def cancel_asked(self, migration: str) -> None:
        """See `amig.host.hosted.Owner`."""
        self.cancel_requested.set()
        if self.on_cancel is not None:
            self.on_cancel(migration)

    def _check_open(self) -> None:
        if self._closed:
            raise ControlError("this connection was closed", code="closed")

    async def close(self) -> None:
        """See `amig.guest.Guest.close`: logging off first, so that the guest resumes without it."""
        if self._closed:
            return
        self._closed = True
        try:
            with contextlib.suppress(AmigError):
                await self.log_stop()
        finally:
            with contextlib.suppress(AmigError):
                await self._hosted.leave(self)


def _frozen(words: Words) -> Words:
    view = words.view()
    view.flags.writeable = False
    return view


Builder = Callable[[bytes, MemoryMap], Machine]
"""Builds a paused machine like the one described, its memory included; blocks. Raises `AmigError`."""


class LocalIncoming:
    """Implements `amig.guest.Incoming` in the process that will run the guest.

    ``builders`` maps an engine's name to what builds its machines.
    """

    def __init__(self, hosted: HostedGuest, builders: Mapping[str, Builder]) -> None:
        self._hosted = hosted
        self._builders = builders
        self._record: ArrivalRecord | None = None
        self._pages: dict[int, Pages] = {}
        self._loaded = False
        self._pool: ThreadPoolExecutor | None = None
        self._over = False

    async def build(self, *, name: str, machine: bytes, memory: MemoryMap) -> str:
        """See `amig.guest.Incoming.build`; ``name`` is the guest's at the source."""
        if self._hosted.has_machine or self._hosted.state is not RunState.INCOMING or self._over:
            raise Refused(f"{self._hosted.name} has a guest already: it is {self._hosted.state}")
        try:
            memory.check()
            envelope = msgspec.msgpack.decode(machine, type=MachineEnvelope)
        except (msgspec.DecodeError, UsageError) as error:
            raise Refused(f"the description of guest {name} makes no sense here: {error}") from None
        builder = self._builders.get(envelope.engine)
        if builder is None:
            raise Refused(
                f"guest {name} runs on the engine {envelope.engine!r}; this host has {', '.join(self._builders)}"
            )
        try:
            self._record = await self._hosted.vm.call(self._hosted.records.arriving, self._hosted.name)
            await self._hosted.vm.call(self._hosted.records.check_may_boot, self._hosted.name)
            built = await self._build(builder, envelope.description, memory)
        except AmigError as error:
            await self._forget()
            raise Refused(f"this host can't build guest {name}: {error}") from error
        except BaseException:
            await self._forget()
            raise
        self._pages = {region.id: built.memory.pages(region.id) for region in memory.regions}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="amig-populate")
        return f"{socket.gethostname()}/{self._hosted.name}"

    async def _build(self, builder: Builder, description: bytes, memory: MemoryMap) -> Machine:
        call = self._hosted.vm.submit(builder, description, memory)
        cancelled = await settle(call)
        if cancelled is not None:
            if call.exception() is None:
                await self._hosted.vm.call(call.result().close)
            raise cancelled
        built = call.result()
        if built.memory.map.regions != memory.regions or built.memory.map.slots != memory.slots:
            await self._hosted.vm.call(built.close)
            raise Refused("the machine was built with another memory layout")
        await self._hosted.adopt(built)
        return built

    def pages(self, region: int) -> Pages:
        """See `amig.guest.Incoming.pages`."""
        return self._pages[region]

    async def populate(self, region: int, first: int, count: int) -> None:
        """See `amig.guest.Incoming.populate`; on a thread of its own, waited for even when cancelled."""
        if self._pool is None:
            raise ControlError("there is no memory to populate", code="wrong-state")
        memory = self._hosted.machine.memory
        await finish(asyncio.wrap_future(self._pool.submit(memory.populate, region, first, count)))

    def punch(self, region: int, first: int, count: int) -> None:
        """See `amig.guest.Incoming.punch`."""
        self._hosted.machine.memory.punch(region, first, count)

    async def load(self, state: bytes) -> None:
        """See `amig.guest.Incoming.load`."""
        try:
            await self._hosted.vm.call(self._hosted.machine.load, state)
        except VerifyFailed:
            raise
        except AmigError as error:
            raise VerifyFailed(f"the guest's device state can't be restored here: {error}") from error
        self._loaded = True

    async def commit(self, migration: str) -> None:
        """See `amig.guest.Incoming.commit`; refused before `load` and after `discard`."""
        if self._record is None or not self._loaded or self._over:
            raise ControlError("nothing was loaded that could be committed to", code="wrong-state")
        await self._hosted.vm.call(self._record.run, migration)

    async def run(self) -> None:
        """See `amig.guest.Incoming.run`; refused before `commit`."""
        if self._record is None or self._record.published != "running":
            raise ControlError("run without commit", code="wrong-state")
        await self._hosted.start()
        self._over = True
        await self._forget(keep_machine=True)

    async def discard(self, migration: str) -> None:
        """See `amig.guest.Incoming.discard`; refused with ``wrong-state`` once committed. Idempotent."""
        if self._record is not None and self._loaded:
            await self._hosted.vm.call(self._record.discard, migration)
        elif self._over:
            return
        self._over = True
        await self._forget()

    async def _forget(self, *, keep_machine: bool = False) -> None:
        record, self._record = self._record, None
        pool, self._pool = self._pool, None
        self._pages = {}
        if pool is not None:
            await asyncio.get_running_loop().run_in_executor(None, pool.shutdown)
        if record is not None:
            await self._hosted.vm.call(record.close)
        if not keep_machine and self._hosted.has_machine:
            await self._hosted.drop()
