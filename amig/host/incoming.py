"""A guest that arrives in this process: `amig.guest.Incoming` over the host that will run it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping

import msgspec

from amig.aio import settle
from amig.errors import AmigError, ControlError, Refused, UsageError, VerifyFailed
from amig.guest import RunState
from amig.host.handover import ArrivalRecord
from amig.host.hosted import HostedGuest
from amig.host.life import MachineEnvelope, StateEnvelope
from amig.host.machine import Machine
from amig.memory import MemoryMap, Pages

Builder = Callable[[bytes, MemoryMap], Machine]
"""Builds a paused machine like the one described, its memory included; blocks. Raises `AmigError`."""

_state_decoder = msgspec.msgpack.Decoder(StateEnvelope)


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
        self._paused = False
        self._over = False

    async def build(self, *, name: str, machine: bytes, memory: MemoryMap) -> str:
        """See `amig.guest.Incoming.build`; ``name`` is the guest's at the source."""
        if self._hosted.has_machine or self._hosted.state is not RunState.INCOMING or self._over:
            raise Refused(f"{self._hosted.name} has a guest already: it is {self._hosted.state}")
        try:
            memory.check()
            envelope = msgspec.msgpack.decode(machine, type=MachineEnvelope)
        except (ValueError, RecursionError, UsageError) as error:  # text that is no UTF-8, too
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

    async def expect(self, migration: str) -> None:
        """See `amig.guest.Incoming.expect`."""
        if self._record is None or self._over:
            raise ControlError("nothing was built that could arrive", code="wrong-state")
        await self._hosted.vm.call(self._record.expect, migration)

    def pages(self, region: int) -> Pages:
        """See `amig.guest.Incoming.pages`."""
        return self._pages[region]

    def populate(self, region: int, first: int, count: int) -> bool:
        """See `amig.guest.Incoming.populate`."""
        return self._hosted.machine.memory.populate(region, first, count)

    def punch(self, region: int, first: int, count: int) -> None:
        """See `amig.guest.Incoming.punch`."""
        self._hosted.machine.memory.punch(region, first, count)

    def data_ranges(self, region: int, first: int, count: int) -> list[tuple[int, int]]:
        """See `amig.guest.Incoming.data_ranges`."""
        return self._hosted.machine.memory.data_ranges(region, first, count)

    async def load(self, state: bytes) -> None:
        """See `amig.guest.Incoming.load`."""
        try:
            envelope = _state_decoder.decode(state)
            await self._hosted.vm.call(self._hosted.machine.load, envelope.machine)
        except VerifyFailed:
            raise
        except msgspec.DecodeError as error:
            raise VerifyFailed(f"the guest's state is malformed: {error}") from None
        except AmigError as error:
            raise VerifyFailed(f"the guest's device state can't be restored here: {error}") from error
        self._loaded = True
        self._paused = envelope.paused

    async def commit(self, migration: str) -> None:
        """See `amig.guest.Incoming.commit`; refused before `load` and after `discard`."""
        if self._record is None or not self._loaded or self._over:
            raise ControlError("nothing was loaded that could be committed to", code="wrong-state")
        await self._hosted.vm.call(self._record.run, migration)

    async def run(self) -> None:
        """See `amig.guest.Incoming.run`; refused before `commit`."""
        if self._record is None or self._record.published != "running":
            raise ControlError("run without commit", code="wrong-state")
        await self._hosted.start(paused=self._paused)
        self._over = True

    async def settle(self) -> None:
        """See `amig.guest.Incoming.settle`."""
        with contextlib.suppress(AmigError, OSError):  # it only keeps what boots, and amig resolve settles it
            await self._hosted.vm.call(self._hosted.records.came_back, self._hosted.name)
        await self._forget(keep_machine=True)

    async def discard(self, migration: str) -> None:
        """See `amig.guest.Incoming.discard`; refused with ``wrong-state`` once committed. Idempotent.

        When the record can't be written the guest is let go of all the same: it is decided when the source asks.
        """
        record = self._record
        if record is not None and record.published == "running":
            raise ControlError(f"migration {migration} is already running here", code="wrong-state")
        if self._over and record is None:
            return
        self._over = True
        try:
            if record is not None:
                await self._hosted.vm.call(record.discard if self._loaded else _abandon(record), migration)
        finally:
            await self._forget()

    async def _forget(self, *, keep_machine: bool = False) -> None:
        record, self._record = self._record, None
        self._pages = {}
        if record is not None:
            await self._hosted.vm.call(record.close)
        if not keep_machine and self._hosted.has_machine:
            # Its memory at once, whoever still holds an array: it may be most of this machine's.
            await self._hosted.vm.call(self._hosted.machine.memory.empty)
            await self._hosted.drop()


def _abandon(record: ArrivalRecord) -> Callable[[str], None]:
    return lambda _: record.abandon()
