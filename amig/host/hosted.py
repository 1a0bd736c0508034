"""A guest and everything its host decides about it: run state, who may pause it, one migration at a time, its end.

Owned by one event loop; nothing here is thread-safe but what says so. The run state follows from a few facts::

    INCOMING ──start──> RUNNING ⇄ PAUSED (an operator's pause, a migration's pause, or both)
                           │        └─commit─> COMMITTED ──release(RUNNING)──> STOPPED (moved)
                           │                       └─────release(DISCARDED)──> as it was before the pause
                           └─ power-off, stop ─> STOPPED;  a crash ─> FAILED

An *owner* is whoever came to migrate the guest (`amig.host.local.LocalGuest`); what it did is undone when it leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from amig.dirty.hub import DirtyLogHub
from amig.errors import AmigError, ControlError, HostError
from amig.guest import GuestInfo, Handover, Outcome, RunState
from amig.host.backends import Backends
from amig.host.handover import Records, SourceHandover
from amig.host.life import Ended as Ended
from amig.host.life import How as How
from amig.host.life import MachineEnvelope, Migration, Owner, StateEnvelope
from amig.host.machine import Machine
from amig.host.vm_thread import VmThread

_log = logging.getLogger(__name__)
T = TypeVar("T")


class HostedGuest:
    """One guest on this host, before, while and after it runs. ``on_change`` is called after every change of state."""

    def __init__(self, name: str, *, records: Records | None = None) -> None:
        self.name = name
        self.records = records or Records()
        self.vm = VmThread(name)
        self.started_at = time.monotonic()
        self.operator_paused = False
        self.migration: Migration | None = None
        self.last_migration: Migration | None = None
        self.reason = ""
        self.ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self.on_change: Callable[[], None] = lambda: None
        self.forsaken = asyncio.Event()
        """Set while a handover is in doubt and whoever committed it has gone: nobody but us can find out."""
        self._phase = RunState.INCOMING
        self._turn = asyncio.Lock()
        self._machine: Machine | None = None
        self._hub: DirtyLogHub | None = None
        self._backends: Backends | None = None
        self._description = b""
        self._vcpus_run = False
        self._pauser: Owner | None = None
        self._prepared: tuple[Owner, SourceHandover] | None = None

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        """What the guest is doing."""
        if self._phase is RunState.RUNNING and (self.operator_paused or self._pauser is not None):
            return RunState.PAUSED
        return self._phase

    @property
    def machine(self) -> Machine:
        """The machine; raises `ControlError` (``wrong-state``) where there is none yet."""
        if self._machine is None:
            raise ControlError(f"{self.name} is waiting for a guest: there is none yet", code="wrong-state")
        return self._machine

    @property
    def has_machine(self) -> bool:
        """Whether a guest has been built here."""
        return self._machine is not None

    @property
    def hub(self) -> DirtyLogHub:
        """The owner of the machine's dirty log."""
        if self._hub is None:
            raise ControlError(f"{self.name} is waiting for a guest: there is none yet", code="wrong-state")
        return self._hub

    @property
    def backends(self) -> Backends:
        """The machine's device backends in other processes."""
        if self._backends is None:
            raise ControlError(f"{self.name} is waiting for a guest: there is none yet", code="wrong-state")
        return self._backends

    @property
    def in_doubt(self) -> Handover | None:
        """The handover that was committed and not released."""
        return self._prepared[1].handover if self._phase is RunState.COMMITTED and self._prepared else None

    def info(self) -> GuestInfo:
        """Return what a migrator has to know."""
        machine = self.machine
        envelope = MachineEnvelope(engine=machine.engine, description=self._description)
        return GuestInfo(
            name=self.name,
            engine=machine.engine,
            vcpus=machine.vcpus,
            memory=machine.memory.map,
            state=self.state,
            machine=msgspec.msgpack.encode(envelope),
            strategies=self.hub.offered,
        )

    def require(self, what: str, *states: RunState) -> None:
        """Raise `ControlError` (``wrong-state``) unless the guest is in one of ``states``."""
        if self.state not in states:
            why = f" ({self.reason})" if self.reason else ""
            raise ControlError(
                f"guest {self.name} is {self.state}{why}; to {what} it would have to be {' or '.join(states)}",
                code="wrong-state",
            )

    # --- life --------------------------------------------------------------------------------------------------------

    async def adopt(self, machine: Machine) -> None:
        """Become the host of a machine that was just built; it is ours to close from here, also on errors."""
        loop = asyncio.get_running_loop()
        try:
            self._description = await self.vm.call(machine.describe)
            hub = DirtyLogHub(machine.log, machine.memory.map)
        except BaseException:
            await self.vm.call(machine.close)
            raise

        def stopped(error: Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(self._machine_stopped, machine, error)

        machine.memory.on_write = hub.mark
        machine.on_stopped = stopped
        self._machine, self._hub = machine, hub
        self._backends = Backends(hub, machine.memory.map, self.vm)

    async def start(self, *, paused: bool = False) -> None:
        """Let the guest run for the first time; ``paused`` as if an operator had paused it at once."""
        async with self._turn:
            self.require("start", RunState.INCOMING)
            _ = self.machine
            self.operator_paused = paused
            self._phase = RunState.RUNNING
            await self._settle()

    async def drop(self) -> None:
        """Let go of a machine that was built and never ran: the host waits for another guest."""
        async with self._turn:
            self.require("drop its machine", RunState.INCOMING)
            await self._close_machine()

    async def stop(self, *, force: bool = False) -> None:
        """Stop the guest for good. Raises `ControlError` (``in-doubt``) after COMMIT, unless ``force``."""
        async with self._turn:
            doubt = self.in_doubt
            if doubt is not None and not force:
                raise ControlError(
                    f"guest {self.name} was handed over to {doubt.destination}, and nobody has said how that ended: "
                    "this copy is kept for the case that the destination never runs it. Resolve it, or stop with force",
                    code="in-doubt",
                )
            if self._phase not in (RunState.STOPPED, RunState.FAILED):
                self._end(RunState.STOPPED, Ended(how=How.STOPPED, reason="stopped by an operator"))

    async def close(self) -> None:
        """Close the machine and the thread; call once nothing uses them. Idempotent."""
        async with self._turn:
            if self._phase not in (RunState.STOPPED, RunState.FAILED, RunState.COMMITTED):
                self._end(RunState.STOPPED, Ended(how=How.STOPPED, reason="its host was closed"))
            try:
                await self._close_machine()
            finally:
                if self._prepared is not None:
                    self._prepared[1].close()
                    self._prepared = None
                self.vm.close()

    async def _close_machine(self) -> None:
        machine, self._machine, self._hub = self._machine, None, None
        backends, self._backends = self._backends, None
        if backends is not None:
            await self.vm.call(backends.close)
        self._vcpus_run = False
        if machine is not None:
            await self.vm.call(machine.close)

    async def _settle(self) -> None:
        """Make the vCPUs do what the state says. Under ``_turn``."""
        run = self.state is RunState.RUNNING
        try:
            await self.vm.call(self._apply, run)
            if self._backends is not None:
                if run:
                    self._backends.run()
                else:
                    await self._backends.stop()
        except AmigError as error:
            if run:
                self._failed(error)
            raise
        finally:
            self.on_change()

    def _apply(self, run: bool) -> None:
        """On the VM thread, so that what we believe of the vCPUs is true even when the caller was cancelled."""
        machine = self._machine
        if machine is None or self._vcpus_run == run:
            return
        if run:
            machine.resume()
        else:
            machine.pause()
        self._vcpus_run = run

    def _machine_stopped(self, machine: Machine, error: Exception | None) -> None:
        if machine is not self._machine or self._phase in (RunState.STOPPED, RunState.FAILED):
            return
        if error is None:
            self._end(RunState.STOPPED, Ended(how=How.POWERED_OFF, reason="the guest switched itself off"))
        else:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        known = error if isinstance(error, AmigError) else HostError(f"{type(error).__name__}: {error}")
        self._end(RunState.FAILED, Ended(how=How.FAILED, reason=str(error), error=known))

    def _end(self, state: RunState, ended: Ended) -> None:
        self._phase = state
        self.reason = ended.reason
        if not self.ended.done():
            self.ended.set_result(ended)
        self.on_change()

    async def while_running(self, what: str, call: Callable[[Machine], T]) -> T:
        """Run ``call`` on the VM thread while the guest runs: no pause begins before it has returned.

        For what writes guest memory: behind a migration's last sync a write would be lost. Raises `ControlError`.
        """
        async with self._turn:
            self.require(what, RunState.RUNNING)
            return await self.vm.call(call, self.machine)

    # --- an operator's pause -----------------------------------------------------------------------------------------

    async def operator_pause(self) -> None:
        """Pause until an operator resumes; no-op when an operator has paused it already. When it fails it is undone."""
        async with self._turn:
            self.require("pause", RunState.RUNNING, RunState.PAUSED)
            before, self.operator_paused = self.operator_paused, True
            try:
                await self._settle()
            except AmigError:
                # A device backend did not stop, and the operator is told that there is no pause: so there is none.
                self.operator_paused = before
                if self.state is RunState.RUNNING:
                    await self._settle()
                raise

    async def operator_resume(self) -> None:
        """Undo `operator_pause`; a migration's pause stays."""
        async with self._turn:
            self.require("resume", RunState.RUNNING, RunState.PAUSED)
            self.operator_paused = False
            await self._settle()

    # --- a migration -------------------------------------------------------------------------------------------------

    def begin_migration(self, owner: Owner, migration: str, destination: str) -> None:
        """Claim the guest; raises `ControlError` (``busy``) while another owner migrates it."""
        self.require("migrate", RunState.RUNNING, RunState.PAUSED)
        self._check_free(owner)
        if self.migration is not None:
            self.last_migration = self.migration
        self.migration = Migration(owner=owner, id=migration, destination=destination)
        _log.info("migration %s of %s to %s begins", migration, self.name, destination)

    def end_migration(self, owner: Owner, status: str, error: str = "") -> None:
        """Note how the owner's migration ended; no-op when it has none."""
        if self.migration is not None and self.migration.owner is owner:
            self.migration.status, self.migration.error = status, error
            self.migration.ended = time.monotonic()
            self.last_migration, self.migration = self.migration, None
            _log.info("migration of %s: %s %s", self.name, status, error)

    def cancel_migration(self) -> str:
        """Ask the migrator to cancel; returns the migration's id. Raises `ControlError`."""
        if self._phase is RunState.COMMITTED:
            raise ControlError(f"guest {self.name} has been handed over: it is too late to cancel", code="too-late")
        if self.migration is None:
            raise ControlError(f"guest {self.name} is not being migrated", code="no-migration")
        self.migration.cancel_requested = True
        self.migration.owner.cancel_asked(self.migration.id)
        return self.migration.id

    def _check_free(self, owner: Owner) -> None:
        for other in (self._pauser, self.migration.owner if self.migration else None):
            if other is not None and other is not owner:
                raise ControlError(f"guest {self.name} is being migrated by {other.name}", code="busy")

    async def pause(self, owner: Owner) -> None:
        """Pause for the last pages; returns when no vCPU runs. Raises `ControlError` (``busy``)."""
        async with self._turn:
            self.require("pause", RunState.RUNNING, RunState.PAUSED)
            self._check_free(owner)
            self._pauser = owner
            await self._settle()

    async def resume(self, owner: Owner) -> None:
        """Undo the owner's pause; no-op without one."""
        async with self._turn:
            if self._pauser is owner and self._phase is RunState.RUNNING:
                self._pauser = None
                await self._settle()
            elif self._phase is not RunState.RUNNING:
                self.require("resume", RunState.RUNNING, RunState.PAUSED)

    async def save(self, owner: Owner) -> bytes:
        """Return device and vCPU state; the owner must have paused the guest."""
        async with self._turn:
            self._require_paused(owner, "save its state")
            state = StateEnvelope(machine=await self.vm.call(self.machine.save), paused=self.operator_paused)
            return msgspec.msgpack.encode(state)

    def _require_paused(self, owner: Owner, what: str) -> None:
        self.require(what, RunState.PAUSED)
        if self._pauser is not owner:
            raise ControlError(f"to {what}, pause the guest first", code="wrong-state")

    async def prepare(self, owner: Owner, handover: Handover) -> None:
        """Preallocate the record of a handover; a second call replaces the first."""
        async with self._turn:
            self.require("prepare a handover", RunState.RUNNING, RunState.PAUSED)
            self._check_free(owner)
            if self._prepared is not None and self._prepared[0] is not owner:
                raise ControlError(f"guest {self.name} is being migrated by {self._prepared[0].name}", code="busy")
            await self.vm.call(self._prepare, owner, handover)

    def _prepare(self, owner: Owner, handover: Handover) -> None:
        if self._prepared is not None:
            self._prepared[1].close()
            self._prepared = None
        self._prepared = (owner, self.records.prepare(self.name, handover))

    async def commit(self, owner: Owner, migration: str) -> None:
        """Write the record; from here on nothing but `release` lets this host run the guest."""
        async with self._turn:
            self._require_paused(owner, "commit")
            if self._prepared is None or self._prepared[0] is not owner:
                raise ControlError("commit without prepare", code="wrong-state")
            if self._prepared[1].handover.migration != migration:
                raise ControlError(f"migration {migration} was not prepared", code="wrong-migration")
            try:
                await self.vm.call(self._commit, self._prepared[1])
            finally:
                self.on_change()

    def _commit(self, record: SourceHandover) -> None:
        record.commit()
        self._phase = RunState.COMMITTED

    async def release(self, migration: str, outcome: Outcome) -> None:
        """End a committed handover; anybody who knows its id may. Raises `ControlError`."""
        async with self._turn:
            self.require("release", RunState.COMMITTED)
            assert self._prepared is not None  # noqa: S101 - COMMITTED implies it
            owner, record = self._prepared
            if record.handover.migration != migration:
                known = record.handover.migration
                raise ControlError(f"guest {self.name} was handed over by migration {known}", code="wrong-migration")
            await self.vm.call(self._release, record, outcome)
            self.forsaken.clear()
            if outcome is Outcome.RUNNING:
                self.end_migration(owner, "completed")
                moved = f"moved to {record.handover.destination}"
                self._end(RunState.STOPPED, Ended(how=How.MOVED, reason=moved, handover=record.handover))
            else:
                self.end_migration(owner, "failed", "the destination discarded the guest")
                await self._settle()

    def _release(self, record: SourceHandover, outcome: Outcome) -> None:
        record.settle(outcome)
        record.close()
        self._prepared = None
        if outcome is Outcome.DISCARDED:
            self._pauser = None
            self._phase = RunState.RUNNING

    async def leave(self, owner: Owner) -> None:
        """Undo what the owner did, unless it committed: its claim, its record, its pause."""
        async with self._turn:
            if self._phase is RunState.COMMITTED and self._prepared is not None and self._prepared[0] is owner:
                self.forsaken.set()
                return
            self.end_migration(owner, "failed", "the migrator left before it was done")
            try:
                if self._pauser is owner:
                    self._pauser = None
                    if self._phase is RunState.RUNNING:
                        await self._settle()
            finally:  # after the guest runs again: removing a file durably may take its time
                if self._prepared is not None and self._prepared[0] is owner:
                    await self.vm.call(self._abandon)

    def _abandon(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared[1].abandon()
