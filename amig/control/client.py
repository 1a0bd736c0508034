"""A guest behind its control socket, as a migrator sees it: `amig.guest.Guest` over the guest protocol."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping

from amig.aio import finish
from amig.control import messages as m
from amig.control import replies as rp
from amig.control import requests as rq
from amig.control import types
from amig.control.bitmaps import BitmapReader
from amig.control.fdpass import close_all
from amig.control.link import DEFAULT_TIMEOUT, Link
from amig.control.take import TakeClient, check_range
from amig.errors import AmigError, ControlError
from amig.guest import GuestInfo, Handover, LogStarted, Outcome
from amig.memory import WORD_PAGES, GuestMemory, MemoryMap, Words

MapMemory = Callable[[MemoryMap, Mapping[int, int]], GuestMemory]
"""Maps the regions' descriptors, which it owns from then on; `amig.host.memory.MappedMemory.from_fds`."""


class SocketGuest:
    """Implements `amig.guest.Guest` over a control socket. Make it with `connect`; always `close` it.

    Every method raises `ControlError`; once the host has gone they all do, with code ``closed``. Cancelling a call
    waits for its answer first, so that what the host did is known.
    """

    def __init__(self, link: Link, info: GuestInfo, memory: GuestMemory, *, timeout: float) -> None:
        self._link = link
        self._info = info
        self._memory = memory
        self._timeout = timeout
        self._bitmaps: BitmapReader | None = None
        self._takes: TakeClient | None = None
        self.cancel_requested = asyncio.Event()
        """Set when an operator asks for the migration that `migration_begin` registered to be cancelled."""
        self.on_cancel: Callable[[str], None] | None = None
        """Called then, with the migration's id."""
        link.on_notice = self._notice
        link.on_broken = self._broken

    @classmethod
    async def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        map_memory: MapMemory,
        client: str = "amig",
        timeout: float = DEFAULT_TIMEOUT,
    ) -> SocketGuest:
        """Open the guest whose host listens at ``path``.

        Raises `NoSuchGuest` when none does, `ControlError` when it refuses; ``timeout`` (seconds) bounds every call.
        """
        link = await Link.connect(path, timeout=timeout)
        try:
            hello, fds = await link.hello(client=client, want_memory=True)
            try:
                info = m.guest_info(hello)
                _expect(fds, len(info.memory.regions))
                passed = dict(zip((r.id for r in info.memory.regions), fds, strict=True))
            except BaseException:
                close_all(fds)
                raise
            return cls(link, info, map_memory(info.memory, passed), timeout=timeout)
        except BaseException:
            link.close()
            raise

    @property
    def info(self) -> GuestInfo:
        """As it was when this object was made."""
        return self._info

    @property
    def memory(self) -> GuestMemory:
        """Live memory, read-only."""
        return self._memory

    # --- the dirty log -----------------------------------------------------------------------------------------------

    async def log_start(self, strategy: str | None, *, unsafe: bool = False, apart: bool = False) -> LogStarted:
        """See `amig.guest.Guest.log_start`; refused with ``already-on`` when this connection is a user already.

        ``apart`` is for a user that counts: see `take_apart`.
        """
        reply, fds = await self._link.request(rq.LogStart(strategy=strategy, unsafe=unsafe, apart=apart), rp.LogIsOn)
        try:
            _expect(fds, 2)
            bitmaps = BitmapReader(fds[0], reply.bitmaps, self._info.memory)
            sock = _take_socket(fds[1])
        except BaseException:
            self._link.post(rq.LogStop())
            raise
        finally:
            close_all(fds)
        self._bitmaps = bitmaps
        self._takes = TakeClient(sock, bitmaps, self._info.memory, generation=reply.generation, timeout=self._timeout)
        return LogStarted(strategy=reply.strategy, initially_set=reply.initially_set, generation=reply.generation)

    async def sync(self) -> Mapping[int, Words]:
        """See `amig.guest.Guest.sync`; the arrays lie in shared memory and can't be written."""
        bitmaps, takes = self._log()
        await takes.sync()
        return dict(bitmaps.pending)

    async def take_and_clear(self, region: int, first: int, count: int) -> Words:
        """See `amig.guest.Guest.take_and_clear`; the words lie in shared memory and can't be written.

        Several calls may be under way: that is how the next chunk is prefetched.
        """
        _, takes = self._log()
        (words, _), cancelled = await takes.take(region, first, count)
        if cancelled is not None:
            await finish(asyncio.ensure_future(self._return(region, first, words)))
            raise cancelled
        return words

    async def take_apart(self, region: int, first: int, count: int) -> tuple[Words, int]:
        """As `take_and_clear`, and how many of the pages are only possibly dirty; what it took is not given back."""
        _, takes = self._log()
        taken, cancelled = await takes.take(region, first, count)
        if cancelled is not None:
            raise cancelled
        return taken

    async def give_back(self, region: int, first: int, taken: Words) -> None:
        """See `amig.guest.Guest.give_back`; large ranges go in several messages."""
        self._log()
        check_range(self._info.memory, region, first, self._pages(region, first, taken))
        await self._return(region, first, taken)

    async def _return(self, region: int, first: int, taken: Words) -> None:
        for start in range(0, len(taken), types.MAX_GIVE_BACK_WORDS):
            part = taken[start : start + types.MAX_GIVE_BACK_WORDS]
            if part.any():
                words = part.astype("<u8", copy=False).tobytes()
                await self._link.ask(rq.GiveBack(region=region, first=first + start * WORD_PAGES, words=words))

    def _pages(self, region: int, first: int, words: Words) -> int:
        return min(len(words) * WORD_PAGES, self._info.memory.region(region).pages - first)

    async def log_counters(self) -> rp.LogCountersAre:
        """Return what the host's dirty log has done and cost so far, over all its users."""
        reply, fds = await self._link.request(rq.LogCounters(), rp.LogCountersAre)
        close_all(fds)
        return reply

    async def log_stop(self) -> None:
        """See `amig.guest.Guest.log_stop`."""
        if self._takes is None:
            return
        self._leave_log()
        await self._link.ask(rq.LogStop())

    def _log(self) -> tuple[BitmapReader, TakeClient]:
        if self._link.broken is not None:
            raise self._link.broken
        if self._bitmaps is None or self._takes is None:
            raise ControlError("this connection is no user of the dirty log: log_start comes first", code="not-a-user")
        return self._bitmaps, self._takes

    def _leave_log(self) -> None:
        if self._takes is not None:
            self._takes.close()
        self._takes = self._bitmaps = None

    # --- run state, handover -----------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """See `amig.guest.Guest.pause`."""
        await self._link.ask(rq.Pause())

    async def resume(self) -> None:
        """See `amig.guest.Guest.resume`."""
        await self._link.ask(rq.Resume())

    async def save(self) -> bytes:
        """See `amig.guest.Guest.save`."""
        reply, fds = await self._link.request(rq.Save(), rp.Saved, limit=types.MAX_SAVE_FRAME)
        close_all(fds)
        return reply.state

    async def prepare(self, handover: Handover) -> None:
        """See `amig.guest.Guest.prepare`."""
        request = rq.Prepare(
            migration=handover.migration, destination=handover.destination[:1024], peer=handover.peer[:1024]
        )
        await self._link.ask(request)

    async def commit(self, migration: str) -> None:
        """See `amig.guest.Guest.commit`."""
        await self._link.ask(rq.Commit(migration=migration))

    async def release(self, migration: str, outcome: Outcome) -> None:
        """See `amig.guest.Guest.release`."""
        await self._link.ask(rq.Release(migration=migration, outcome=outcome))

    # --- what others may see of this migration -----------------------------------------------------------------------

    async def migration_begin(self, migration: str, destination: str) -> None:
        """Claim the guest: refused with ``busy`` when another connection migrates it."""
        self.cancel_requested.clear()
        await self._link.ask(rq.MigrationBegin(migration=migration, destination=destination[:1024]))

    def migration_progress(self, progress: types.Progress) -> None:
        """Show figures to whoever asks the host; never waits, and a lost one does not matter."""
        if self._link.buffered == 0:  # a host that does not read has enough to catch up with
            self._link.post(rq.MigrationProgress(progress=progress))

    async def migration_end(self, status: str, error: str = "") -> None:
        """Say how it ended: ``completed``, ``cancelled`` or ``failed``."""
        await self._link.ask(rq.MigrationEnd(status=status, error=error[:4096]))

    def _notice(self, notice: types.Notice) -> None:
        if isinstance(notice, rp.CancelRequested):
            self.cancel_requested.set()
            if self.on_cancel is not None:
                self.on_cancel(notice.migration)

    def _broken(self, _error: ControlError) -> None:
        self._leave_log()

    async def close(self) -> None:
        """Leave: the host undoes this connection's pause and log, unless it committed. Idempotent, never raises.

        Returns when the host has done so (or is gone). Memory is unmapped when the last array over it is gone.
        """
        try:
            if self._link.broken is None:
                await self.log_stop()
                await self._link.ask(rq.Leave())
        except AmigError:
            pass  # gone or refusing: hanging up has the same effect there
        finally:
            self._link.close()
            self._leave_log()
            close = getattr(self._memory, "close", None)
            if close is not None:
                close()


def _expect(fds: list[int], count: int) -> None:
    if len(fds) != count:
        raise ControlError(f"the host passed {len(fds)} descriptors instead of {count}", code="descriptors")


def _take_socket(fd: int) -> socket.socket:
    """Return a socket over a duplicate of ``fd``, if it is what it should be."""
    try:
        sock = socket.socket(fileno=os.dup(fd))
    except OSError:
        raise ControlError("the host passed something else for the take socket", code="descriptors") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
        sock.close()
        raise ControlError("the host passed something else for the take socket", code="descriptors")
    return sock
