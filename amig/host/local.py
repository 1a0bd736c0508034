"""A guest in this very process: `amig.guest.Guest` without a socket between.

The server gives each connection a `LocalGuest`, so that what happens when one ends is written once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping

from amig.aio import finish, settle
from amig.bitmap import count as count_bits
from amig.control.take import check_range
from amig.control.types import Progress
from amig.dirty.hub import HubUser
from amig.errors import AmigError, ControlError, GuestError, KvmError, UsageError
from amig.guest import GuestInfo, Handover, LogStarted, Outcome, RunState
from amig.host.hosted import HostedGuest
from amig.host.incoming import Builder as Builder
from amig.memory import WORD_PAGES, GuestMemory, Words


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

    async def log_start(self, strategy: str | None, *, unsafe: bool = False, apart: bool = False) -> LogStarted:
        """See `amig.guest.Guest.log_start`; refused with ``already-on`` when this object is a user already.

        ``apart`` is for a user that counts: see `take_apart`.
        """
        self._check_open()
        if self._user is not None:
            raise ControlError("this connection is a user of the dirty log already", code="already-on")
        self._hosted.require("be migrated", RunState.RUNNING, RunState.PAUSED)
        with refusing():
            return await self._hosted.vm.call(self._open, strategy, unsafe, apart)

    def _open(self, strategy: str | None, unsafe: bool, apart: bool) -> LogStarted:
        user = self._hosted.hub.open(self.name, strategy, unsafe=unsafe, apart=apart)
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

    async def take_apart(self, region: int, first: int, count: int) -> tuple[Words, int]:
        """As `take_and_clear`, and how many of the pages are only possibly dirty; what it took is not given back."""
        user = self.log_user
        with refusing():
            check_range(self._info.memory, region, first, count)
            taken, possible = await self._hosted.vm.call(user.take_apart, region, first, count, self._generation)
            return _frozen(taken), count_bits(possible)

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
