"""What each request of the guest protocol means on this host: one session for each connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Protocol

import numpy as np

from amig.aio import finish
from amig.control import messages as m
from amig.control import replies as rp
from amig.control import requests as rq
from amig.control import types
from amig.control.bitmaps import SharedBitmaps, reopen_read_only
from amig.control.fdpass import close_all
from amig.control.server import Answer, Outbox
from amig.control.take import TakeServer
from amig.errors import ControlError, HostError
from amig.guest import RunState
from amig.host.backends import Backend, Backends
from amig.host.guest_image import ask_guest
from amig.host.hosted import HostedGuest
from amig.host.life import Ended
from amig.host.local import LocalGuest
from amig.host.status import log_counters, status

MAX_CONSOLE_BACKLOG = 256 << 10
"""Bytes of console output queued for one client; more is dropped, and counted."""


Listener = Callable[[bytes], None]


class Console(Protocol):
    """Where a session finds the guest's serial port; `amig.host.relay.ConsoleRelay`."""

    @property
    def attached(self) -> int:
        """How many listen."""

    def attach(self, listener: Listener, *, replay: bool) -> None:
        """Call ``listener`` with what comes, on the event loop; with ``replay`` first with what came lately."""

    def detach(self, listener: Listener) -> None:
        """Stop that; idempotent."""

    async def feed(self, data: bytes) -> None:
        """Bytes for the guest."""


class _Log:
    """What a connection that uses the dirty log has beside its `LocalGuest`."""

    def __init__(self, guest: LocalGuest) -> None:
        self.bitmaps = SharedBitmaps(guest.info.memory)
        try:
            self.takes = TakeServer(guest.log_user, self.bitmaps, guest.info.memory)
        except BaseException:
            self.bitmaps.close()
            raise

    async def close(self) -> None:
        """Wait for the take thread, then give the bitmaps back."""
        try:
            await finish(asyncio.get_running_loop().run_in_executor(None, self.takes.close))
        finally:
            self.bitmaps.close()


class HostSession:
    """Implements `amig.control.server.Session`."""

    def __init__(self, hosted: HostedGuest, outbox: Outbox, console: Console) -> None:
        self._hosted = hosted
        self._outbox = outbox
        self._console = console
        self._client = ""
        self._guest: LocalGuest | None = None
        self._log: _Log | None = None
        self._backend: Backend | None = None
        self._backends: Backends | None = None
        self._dropped = 0
        hosted.ended.add_done_callback(self._guest_ended)

    async def answer(self, request: m.AnyRequest) -> Answer:
        """Do what is asked; the replies are in docs/guest-protocol.md."""
        if isinstance(request, rq.Hello):
            return self._hello(request)
        if not self._client:
            raise ControlError("hello comes first", code="hello-first")
        match request:
            case rq.Status():
                return Answer(await status(self._hosted, request=request.id, consoles=self._console.attached))
            case rq.LogStart():
                return await self._log_start(request)
            case rq.Sync():
                guest, log = self._logging()
                await guest.sync_into(log.bitmaps.pending)
            case rq.GiveBack():
                await self._give_back(request)
            case rq.LogCounters():
                return Answer(log_counters(self._hosted, request=request.id))
            case rq.LogStop():
                await self._log_stop()
            case rq.Pause():
                await self._user().pause()
            case rq.Resume():
                await self._user().resume()
            case rq.Save():
                state = await self._user().save()
                if len(state) > types.MAX_SAVE_FRAME - 1024:
                    raise ControlError(
                        f"a device state of {len(state)} bytes is too large to pass on", code="too-large"
                    )
                return Answer(rp.Saved(id=request.id, state=state))
            case rq.Prepare():
                await self._user().prepare(m.handover(request))
            case rq.Commit():
                await self._user().commit(request.migration)
            case rq.Release():
                await self._hosted.release(request.migration, request.outcome)
            case rq.MigrationBegin():
                await self._user().migration_begin(request.migration, request.destination)
            case rq.MigrationProgress():
                self._user().migration_progress(request.progress)
            case rq.MigrationEnd():
                await self._user().migration_end(request.status, request.error)
            case rq.Leave():
                await self._leave()
            case rq.Cancel():
                self._hosted.cancel_migration()
            case rq.OperatorPause():
                await self._hosted.operator_pause()
            case rq.OperatorResume():
                await self._hosted.operator_resume()
            case rq.Stop():
                await self._hosted.stop(force=request.force)
            case rq.GuestAsk():
                return Answer(rp.GuestAsked(id=request.id, number=await ask_guest(self._hosted, request.what)))
            case rq.ConsoleAttach():
                self._console.attach(self.console_output, replay=request.replay)
            case rq.ConsoleInput():
                await self._console.feed(request.data)
            case rq.ConsoleDetach():
                self._console.detach(self.console_output)
            case rq.VhostAttach():
                return await self._vhost_attach(request)
            case rq.VhostStopped():
                self._device().stopped(request.number)
            case rq.VhostDetach():
                await self._vhost_detach(in_order=True)
        return Answer(rp.Ok(id=request.id))

    def _hello(self, request: rq.Hello) -> Answer:
        if request.version != types.VERSION:
            raise ControlError(
                f"this host speaks version {types.VERSION} of the guest protocol, not {request.version}", code="version"
            )
        missing = sorted(set(request.require) - types.FEATURES)
        if missing:
            raise ControlError(f"this host can't do {', '.join(missing)}", code="unsupported-feature")
        self._client = request.client or "unnamed"
        pid = os.getpid()
        hosted = self._hosted
        if not hosted.has_machine:
            if request.want_memory:
                raise ControlError(f"{hosted.name} is waiting for a guest: there is none yet", code="wrong-state")
            features = tuple(sorted(types.FEATURES))
            hello = rp.HelloOk(
                id=request.id,
                version=types.VERSION,
                features=features,
                name=hosted.name,
                pid=pid,
                engine="",
                vcpus=0,
                state=hosted.state,
            )
            return Answer(hello)
        info = hosted.info()
        fds: list[int] = []
        if request.want_memory:
            ours = hosted.machine.memory.fds()
            try:
                for region in info.memory.regions:
                    fds.append(reopen_read_only(ours[region.id]))  # noqa: PERF401 - to be closed if one fails
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise
        return Answer(m.hello_ok(info, request=request.id, pid=pid, descriptors=len(fds)), tuple(fds))

    def _user(self) -> LocalGuest:
        if self._guest is None:
            guest = LocalGuest(self._hosted, name=self._client)
            guest.on_cancel = lambda migration: self._outbox.notify(rp.CancelRequested(migration=migration))
            self._guest = guest
        return self._guest

    # --- the dirty log -----------------------------------------------------------------------------------------------

    async def _log_start(self, request: rq.LogStart) -> Answer:
        guest = self._user()
        started = await guest.log_start(request.strategy, unsafe=request.unsafe, apart=request.apart)
        try:
            log = _Log(guest)
        except BaseException:
            await guest.log_stop()
            raise
        self._log = log
        fds = (log.bitmaps.reader_fd(), log.takes.peer.detach())
        log.takes.start()
        reply = rp.LogIsOn(
            id=request.id,
            strategy=started.strategy,
            initially_set=started.initially_set,
            generation=started.generation,
            bitmaps=log.bitmaps.places,
        )
        return Answer(reply, fds)

    def _logging(self) -> tuple[LocalGuest, _Log]:
        if self._log is None or self._guest is None:
            raise ControlError("this connection is no user of the dirty log: log-start comes first", code="not-a-user")
        return self._guest, self._log

    async def _give_back(self, request: rq.GiveBack) -> None:
        guest, _ = self._logging()
        if len(request.words) % 8 or not request.words:
            raise ControlError("a bitmap is a whole number of words", code="bad-range")
        words = np.frombuffer(request.words, dtype="<u8").astype(np.uint64)
        await guest.give_back(request.region, request.first, words)

    async def _log_stop(self) -> None:
        log, self._log = self._log, None
        try:
            if log is not None:
                await log.close()
        finally:
            if self._guest is not None:
                await self._guest.log_stop()

    # --- a device backend --------------------------------------------------------------------------------------------

    async def _vhost_attach(self, request: rq.VhostAttach) -> Answer:
        if self._backend is not None:
            raise ControlError("this connection is a device backend already", code="already-on")
        backends, machine = self._hosted.backends, self._hosted.machine
        self._hosted.require("get a device backend", RunState.RUNNING, RunState.PAUSED)

        def tell(number: int) -> None:
            self._outbox.notify(rp.VhostStop(number=number) if number else rp.VhostRun())

        backend = Backend(self._client, tell)
        log = await backends.attach(backend)
        self._backend, self._backends = backend, backends
        memory = machine.memory
        ours = memory.fds()
        fds: list[int] = []
        try:
            for fd in (*(ours[region.id] for region in memory.map.regions), log.fd):
                fds.append(os.dup(fd))  # noqa: PERF401 - to be closed if one fails
        except BaseException:
            close_all(fds)
            raise
        reply = rp.VhostIsAttached(
            id=request.id, memory=types.WireMap.of(memory.map), log_bytes=log.size, running=not backend.rests.is_set()
        )
        return Answer(reply, tuple(fds))

    def _device(self) -> Backend:
        if self._backend is None:
            raise ControlError("this connection is no device backend: vhost-attach comes first", code="wrong-state")
        return self._backend

    async def _vhost_detach(self, *, in_order: bool) -> None:
        backend, self._backend = self._backend, None
        if backend is not None and self._backends is not None:
            await self._backends.leave(backend, in_order=in_order)

    # --- console -----------------------------------------------------------------------------------------------------

    def console_output(self, data: bytes) -> None:
        """Pass on what the guest wrote; a client that does not read loses it, never the guest its time."""
        for start in range(0, len(data), types.MAX_CONSOLE_BYTES):
            part = data[start : start + types.MAX_CONSOLE_BYTES]
            if self._outbox.buffered > MAX_CONSOLE_BACKLOG:
                self._dropped += len(part)
            else:
                dropped, self._dropped = self._dropped, 0
                self._outbox.notify(rp.ConsoleOutput(data=part, dropped=dropped))

    # --- the end -----------------------------------------------------------------------------------------------------

    def _guest_ended(self, ended: asyncio.Future[Ended]) -> None:
        if self._client:
            reason = ended.result().reason[:4096]
            self._outbox.notify(rp.GuestEnded(state=self._hosted.state, reason=reason))

    async def _leave(self) -> None:
        """Logging off, then the guest's pause undone: the thread that takes must be gone before its user is."""
        try:
            await self._log_stop()
        finally:
            guest, self._guest = self._guest, None
            if guest is not None:
                await guest.close()

    async def end(self) -> None:
        """Undo what this connection did."""
        self._hosted.ended.remove_done_callback(self._guest_ended)
        self._console.detach(self.console_output)
        with contextlib.suppress(ControlError, HostError):
            await self._vhost_detach(in_order=False)
        with contextlib.suppress(ControlError):
            await self._leave()
