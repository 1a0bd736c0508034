"""A machine without KVM: threads that write guest memory as the guest image does, with an exact dirty log.

It is the fallback where /dev/kvm is missing and the partner of tests that need a guest which can be trusted. Nothing
that it shows is a claim about KVM: its ``engine`` is ``"simulator"``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from amig.dirty.log import KernelLog, LogAbilities
from amig.errors import GuestError, UsageError, VerifyFailed
from amig.host import guest_abi as abi
from amig.host.guest_abi import MAX_CPUS, Bad, Phase
from amig.host.memory import MakeMemory, MemfdMemory
from amig.memory import MemoryMap
from amig.sim.kernel_log import MODERN, SimKernelLog
from amig.sim.options import SimOptions
from amig.sim.plan import Plan
from amig.sim.ram import SimRam
from amig.sim.vcpu import SimVcpu, VcpuState

_log = logging.getLogger(__name__)

MAX_DESCRIPTION = 1 << 20
MAX_STATE = 1 << 20


class _Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Literal[1] = 1
    options: SimOptions


class _State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Literal[1] = 1
    tsc: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    booted: bool
    saves: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    """How often the state was saved; the guest's memory knows it too."""
    vcpus: Annotated[tuple[VcpuState, ...], msgspec.Meta(min_length=1, max_length=MAX_CPUS)]


class SimMachine:
    """Implements `amig.host.machine.Machine`; owns ``memory`` from here on, also when this raises.

    The guest it runs writes the status page, the vCPU blocks and the pages of guest/amig_guest.h and obeys the control
    page, so that it is observed as a real one is. Its TSC goes on where it was saved, as a real one's does. Saving
    writes a word of guest memory, for that is what real machines may do (design rule 8); a destination that missed it
    counts a mismatch.
    """

    engine: str = "simulator"

    def __init__(
        self,
        memory: MemfdMemory,
        options: SimOptions,
        *,
        abilities: LogAbilities = MODERN,
        serial: Callable[[bytes], None] | None = None,
    ) -> None:
        """Build a paused machine; ``serial`` gets its console output. Raises `UsageError` when memory is too small."""
        self.memory = memory
        self.options = options
        self.vcpus = options.vcpus
        self.on_stopped: Callable[[Exception | None], None] | None = None
        self.kernel_log = SimKernelLog(memory.map, abilities)
        self.log: KernelLog = self.kernel_log
        self._serial = serial
        self._offset = -time.monotonic_ns()
        self._change = threading.Condition()
        self._paused = True
        self._closing = False
        self._ended = False
        self._active = 0
        self._threads: list[threading.Thread] = []
        self._booted = False
        self._loaded = False
        self._saves = 0
        try:
            self._ram = SimRam(memory, self.kernel_log)
            self._ram.view(0, abi.SHARED_END)
            self._plan = Plan(options, self._ram)
            self._vcpus = [SimVcpu(index, self._plan, self._ram, self.tsc, self._say) for index in range(options.vcpus)]
        except BaseException:
            memory.close()
            raise

    @classmethod
    def boot(
        cls,
        size: int,
        options: SimOptions,
        *,
        hugepages: bool = False,
        serial: Callable[[bytes], None] | None = None,
    ) -> SimMachine:
        """Build a paused machine with ``size`` bytes of memory; raises `UsageError` or `HostError`, nothing left."""
        return cls(MemfdMemory.create(size, hugepages=hugepages), options, serial=serial)

    @classmethod
    def build_like(
        cls,
        description: bytes,
        memory_map: MemoryMap,
        *,
        make_memory: MakeMemory = MemfdMemory,
        abilities: LogAbilities = MODERN,
        serial: Callable[[bytes], None] | None = None,
    ) -> SimMachine:
        """Build a machine from what `describe` returned elsewhere; raises `UsageError` for anything else."""
        if len(description) > MAX_DESCRIPTION:
            raise UsageError("the description of a simulated guest is too long")
        try:
            found = msgspec.msgpack.decode(description, type=_Description)
        except (ValueError, RecursionError) as error:  # text that is no UTF-8, too
            raise UsageError(f"not the description of a simulated guest: {error}") from error
        memory = make_memory(memory_map)
        return cls(memory, found.options, abilities=abilities, serial=serial)

    def tsc(self) -> int:
        """Return the guest's clock, in nanoseconds."""
        return time.monotonic_ns() + self._offset

    def describe(self) -> bytes:
        """Return what a destination needs to build the same machine; see `build_like`."""
        return msgspec.msgpack.encode(_Description(options=self.options))

    def resume(self) -> None:
        """Let the vCPUs run; the first time boots the guest, unless a state was loaded."""
        with self._change:
            self._check_alive()
            if not self._paused:
                return
            if not self._threads:
                self._begin()
            self._paused = False
            self._change.notify_all()

    def pause(self) -> None:
        """Stop the vCPUs between two steps; returns when none runs. Idempotent."""
        with self._change:
            self._paused = True
            self._change.notify_all()
            while self._active:
                self._change.wait()

    def save(self) -> bytes:
        """Return all state outside of memory; the machine must be paused. Dirties a page."""
        with self._change:
            self._check_alive()
            if not self._paused or self._active:
                raise GuestError("a guest that runs can't be saved: pause it first")
            self._saves += 1
            if self._booted:
                with self._ram.stores(abi.CPU_GPA, abi.CPU_STRIDE):
                    self._vcpus[0].block["reserved"][0, 0] = self._saves
            state = _State(
                tsc=self.tsc(),
                booted=self._booted,
                saves=self._saves,
                vcpus=tuple(vcpu.state for vcpu in self._vcpus),
            )
            return msgspec.msgpack.encode(state)

    def load(self, state: bytes) -> None:
        """Restore what `save` returned, before the first `resume`; raises `VerifyFailed` unless it fits the machine."""
        if len(state) > MAX_STATE:
            raise VerifyFailed("the state of a simulated guest is too long")
        try:
            found = msgspec.msgpack.decode(state, type=_State)
        except (ValueError, RecursionError) as error:  # text that is no UTF-8, too
            raise VerifyFailed(f"not the state of a simulated guest: {error}") from error
        if len(found.vcpus) != self.vcpus or not all(
            vcpu.check_state(loaded) for vcpu, loaded in zip(self._vcpus, found.vcpus, strict=True)
        ):
            raise VerifyFailed("the state belongs to another simulated guest")
        with self._change:
            self._check_alive()
            if self._threads:
                raise GuestError("a state can't be loaded into a guest that has run")
            for vcpu, loaded in zip(self._vcpus, found.vcpus, strict=True):
                vcpu.state = loaded
            self._offset = found.tsc - time.monotonic_ns()
            self._booted = self._loaded = found.booted
            self._saves = found.saves

    def verify(self) -> int:
        """Return how many checked pages are not what the guest's tables say; also while it runs. Blocks for long."""
        return sum(vcpu.wrong() for vcpu in self._vcpus)

    def serial_input(self, data: bytes) -> None:
        """Feed the console, which echoes."""
        if self._serial is not None:
            self._serial(data)

    def close(self) -> None:
        """Stop the vCPUs for good and give memory back; idempotent."""
        with self._change:
            self._closing = True
            self._change.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()
        self.memory.close()

    def _check_alive(self) -> None:
        if self._closing or self._ended:
            raise GuestError("the simulated guest has ended")

    def _begin(self) -> None:
        if not self._booted:
            self._plan.write_status(self._ram, self.tsc())
            for vcpu in self._vcpus:
                vcpu.boot()
            self._booted = True
        elif self._loaded:
            self._check_memory()
        for index, vcpu in enumerate(self._vcpus):
            thread = threading.Thread(target=self._run, args=(vcpu,), name=f"sim-vcpu-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _check_memory(self) -> None:
        """Compare what only memory and state together can know; each difference is a mismatch of vCPU 0."""
        vcpu = self._vcpus[0]
        found = int(vcpu.block["reserved"][0, 0])
        if found != self._saves:
            kind = Bad.STALE if found < self._saves else Bad.NEWER
            vcpu.mismatch(0, abi.CPU_GPA, self._saves, 0, found, kind, 0, Phase.REQUEST)

    def _run(self, vcpu: SimVcpu) -> None:
        """Step until closed; the body of a vCPU's thread."""
        wait = 0.0
        while True:
            with self._change:
                if wait and not self._paused and not self._closing:
                    self._change.wait(wait)
                while self._paused and not self._closing:
                    self._change.wait()
                if self._closing or self._ended:
                    return
                self._active += 1
            try:
                wait = vcpu.step()
            except Exception as error:
                _log.exception("vCPU %d of the simulated guest stopped", vcpu.index)
                self._stop(error if isinstance(error, GuestError) else GuestError(f"the simulator failed: {error}"))
                return
            finally:
                with self._change:
                    self._active -= 1
                    if self._paused:
                        self._change.notify_all()

    def _stop(self, error: Exception | None) -> None:
        with self._change:
            if self._ended or self._closing:
                return
            self._ended = True
            self._change.notify_all()
            told = self.on_stopped
        if error is not None:
            self._vcpus[0].fault()
        if told is not None:
            told(error)

    def _say(self, text: str) -> None:
        if self._serial is not None:
            self._serial(f"{text}\r\n".encode())
