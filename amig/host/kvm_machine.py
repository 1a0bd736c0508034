"""A machine on KVM: memory, processors, the devices of a small PC; implements `amig.host.machine.Machine`."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from amig.dirty.log import KernelLog
from amig.errors import AmigError, BootError, HostError, KvmError, Refused, UsageError, VerifyFailed
from amig.host import boot_linux, boot_pvh, elf, kvm_board, kvm_state, platform
from amig.host.boot import BootConfig, BootPlan, read_image
from amig.host.exits import MmioBus, PortBus
from amig.host.kvm_log import KvmLog
from amig.host.kvm_probe import check_kernels_run
from amig.host.machine import Machine
from amig.host.memory import MakeMemory, MemfdMemory
from amig.host.ring_log import RingLog
from amig.host.serial import COM1_IRQ, Serial16550
from amig.host.stopped import Stopped
from amig.host.vcpu import State, VcpuThread
from amig.kvm import snapshot
from amig.kvm import state as vcpu_state
from amig.kvm.abi_numbers import Cap
from amig.kvm.cpuid import CpuModel, compatible
from amig.kvm.system import Kvm
from amig.kvm.vcpu import Vcpu
from amig.memory import MemoryMap

log = logging.getLogger(__name__)

Sink = Callable[[bytes], None]
"""Takes what the guest writes to its serial port; called on vCPU threads, must not block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """The machine that `amig run` asks for."""

    memory: int
    """Bytes of RAM, a multiple of 4096 (of 2 MiB with ``hugepages``)."""
    vcpus: int = 1
    hugepages: bool = False
    cpu: str = "host"
    """``host``, or ``host,-feature,...``."""
    wait_port: bool = True
    """Serve the port on which amig's own guest image sleeps; without it that image spins."""
    initially_set: bool = True
    """Let dirty logs start all ones where the kernel can do that (Linux 5.7)."""
    dirty_ring: int = 0
    """Bytes of each vCPU's dirty ring, a power of two; 0 logs by bitmap."""


def _drop(data: bytes) -> None:
    """The sink of a serial port that is connected to nothing."""


class KvmMachine:
    """See `amig.host.machine.Machine`. Made by `boot` or `build_like`; ``close`` it, from any thread but a vCPU's."""

    engine: str = "kvm"

    def __init__(
        self,
        *,
        kvm: Kvm,
        memory: MemfdMemory,
        model: CpuModel,
        vcpus: int,
        wait_port: bool,
        sink: Sink = _drop,
        initially_set: bool = True,
        dirty_ring: int = 0,
    ) -> None:
        """Build it, vCPUs not started; owns ``memory`` (not ``kvm``) unless it raises."""
        self.memory = memory
        self.vcpus = vcpus
        self.on_stopped: Callable[[Exception | None], None] | None = None
        self.on_workload_end: Callable[[int], None] | None = None
        """Called on a vCPU's thread when amig's own image says that its workload has ended (0: memory intact)."""
        self.boot_plan: BootPlan | None = None
        self._model = model
        self._wait_port = wait_port
        self._lock = threading.RLock()  # of run state: held through whole calls; vCPU threads never take it
        self._end_lock = threading.Lock()
        self._ended = False
        self._started = False
        self._paused = True
        self._closed = False
        self._broken = ""
        self._board = kvm_board.build(kvm, memory, model, vcpus, dirty_ring=dirty_ring)
        self._vm = self._board.vm
        try:
            self.log: KernelLog
            ring_full: Callable[[Vcpu], None] | None = None
            if dirty_ring:
                ring_log = RingLog(self._vm, [v.dirty_ring for v in self._board.vcpus if v.dirty_ring is not None])
                ring_full = ring_log.full
                self.log = ring_log
            else:
                self.log = KvmLog(self._vm, initially_set=initially_set)
            self._com1 = Serial16550(irq=self._com1_interrupt, sink=sink)
            self._power = platform.PowerManagement()
            ports, mmio = PortBus(), MmioBus()
            platform.wire(
                ports, com1=self._com1, power=self._power, on_workload_end=self._workload_ended, wait_port=wait_port
            )
            self._threads = tuple(
                VcpuThread(
                    vcpu,
                    ports,
                    mmio,
                    on_stopped=self._vcpu_stopped,
                    on_dirty_ring_full=ring_full,
                    read_memory=self._peek,
                )
                for vcpu in self._board.vcpus
            )
        except BaseException:
            self._vm.close()
            raise

    @classmethod
    def boot(cls, config: MachineConfig, boot: BootConfig, *, sink: Sink = _drop) -> KvmMachine:
        """Build a machine and load a kernel into it; ``resume`` starts it.

        Raises `BootError`, also where this KVM can't run a Linux kernel, `KvmUnavailable`, `UsageError`, `HostError`
        (no memory), with nothing left behind.
        """
        image = read_image(boot.kernel, "kernel")
        with Kvm.open() as kvm, contextlib.ExitStack() as undo:
            model = kvm_board.cpu_model(kvm, config.cpu)
            memory = MemfdMemory.create(config.memory, hugepages=config.hugepages)
            undo.callback(memory.close)
            machine = cls(
                kvm=kvm, memory=memory, model=model, vcpus=config.vcpus,
                wait_port=config.wait_port, sink=sink, initially_set=config.initially_set,
                dirty_ring=config.dirty_ring,
            )  # fmt: skip
            undo.callback(machine.close)
            machine._load_kernel(kvm, boot, image)
            undo.pop_all()
        return machine

    @classmethod
    def build_like(
        cls,
        description: bytes,
        memory_map: MemoryMap,
        *,
        make_memory: MakeMemory = MemfdMemory,
        sink: Sink = _drop,
        initially_set: bool = True,
        dirty_ring: int = 0,
    ) -> KvmMachine:
        """Build a machine like the one that `describe` described, to be filled and ``load``-ed.

        Raises `Refused`, naming what this host lacks, for anything that came from outside; `KvmUnavailable` or
        `HostError` when this host has no KVM or no memory.
        """
        wanted = kvm_state.decode_description(description)
        with Kvm.open() as kvm, contextlib.ExitStack() as undo:
            wanted.check(kvm_board.offered_cpuid(kvm))
            try:
                memory = make_memory(memory_map)
                undo.callback(memory.close)
                machine = cls(
                    kvm=kvm, memory=memory, model=wanted.model(), vcpus=wanted.vcpus,
                    wait_port=kvm_state.WAIT_PORT_DEVICE in wanted.devices, sink=sink, initially_set=initially_set,
                    dirty_ring=dirty_ring,
                )  # fmt: skip
                undo.callback(machine.close)
            except (UsageError, KvmError) as error:
                raise Refused(f"this host can't build the guest's machine: {error}") from error
            here = machine._board.tsc_khz
            scaling = bool(kvm.check_extension(Cap.TSC_CONTROL))
            if not snapshot.tsc_fits(wanted.tsc_khz, here, scaling=scaling):
                raise Refused(
                    f"the guest's TSC runs at {wanted.tsc_khz} kHz, this host's at {here} kHz and it can't scale it: "
                    "move to a host of the same frequency, or one with TSC scaling"
                )
            machine._start_threads()  # now, and not while the guest waits: starting a thread takes a millisecond or two
            undo.pop_all()
        return machine

    def _start_threads(self) -> None:
        for thread in self._threads:
            if thread.state is State.NEW:
                thread.start(paused=True)

    def describe(self) -> bytes:
        """Return what `build_like` needs, with the memory map, to build the same machine elsewhere."""
        return kvm_state.encode(
            kvm_state.Description.of(
                vcpus=self.vcpus,
                model=self._model,
                seen=self._board.seen,
                tsc_khz=self._board.tsc_khz,
                wait_port=self._wait_port,
            )
        )

    @property
    def ended(self) -> bool:
        """Whether the guest has ended by itself."""
        return self._ended

    def resume(self) -> None:
        """Let the vCPUs run; nothing happens when they do, or when the guest has ended by itself."""
        with self._lock:
            self._check_open()
            if self._broken:
                raise HostError(f"this machine must not run: {self._broken}")
            if self._ended:
                return
            if not self._started:
                self._started = True
                self._start_threads()
            elif self._paused:
                for vcpu in self._board.vcpus:
                    vcpu.kvmclock_ctrl()  # else a guest's watchdog takes the pause for a lockup
            self._paused = False
            for thread in self._threads:
                thread.resume()
            if self._ended:  # meanwhile: the one that saw it asked the others to pause, perhaps before the loop above
                self._request_pause()

    def pause(self) -> None:
        """Stop the vCPUs at an instruction boundary, port and memory accesses completed; idempotent.

        A guest that has ended by itself counts as paused. Raises `HostError` when a vCPU does not come to rest within
        ten seconds; ``resume`` takes the request back.
        """
        with self._lock:
            self._check_open()
            if self._started:
                self._request_pause()
                for thread in self._threads:
                    thread.wait_paused()
            self._paused = True

    def save(self) -> bytes:
        """Return vCPU, VM and device state; the machine must be paused (`HostError`)."""
        with self._lock:
            self._check_open()
            if not self._paused:
                raise HostError("the machine's state can be saved only while it is paused")
            if self._ended:
                raise HostError("the guest has ended: there is no state to save")
            # The board first: an interrupt that its timer raises in between is then in the processor's state, while
            # the other way round it would be in neither.
            vm = snapshot.save_vm(self._vm)
            vcpus = tuple(vcpu_state.encode(snapshot.save_vcpu(v, self._vm)) for v in self._board.vcpus)
            return kvm_state.encode(
                kvm_state.MachineState(
                    version=kvm_state.STATE_VERSION,
                    vm=vcpu_state.encode(vm),
                    vcpus=vcpus,
                    com1=self._com1.save(),
                    power=self._power.save(),
                )
            )

    def load(self, state: bytes) -> None:
        """Restore what `save` returned, before the first ``resume``; guest memory must be in place.

        Raises `VerifyFailed` when the state is broken or does not fit this machine, `KvmError` when KVM refuses a
        part. After an error the machine refuses to run.
        """
        parts = kvm_state.decode_state(state)
        vm, vcpus = parts.open()
        if len(vcpus) != self.vcpus:
            raise VerifyFailed(f"the device state has {len(vcpus)} vCPUs, this machine {self.vcpus}")
        for vcpu, saved in zip(self._board.vcpus, vcpus, strict=True):
            self._check_announced(vcpu, saved)
        with self._lock:
            self._check_open()
            if self._started:
                raise HostError("state can be loaded only before the machine first runs")
            self._broken = "loading its state failed"
            # Processors first: an interrupt that is pending in the board is then delivered to them (twice at worst),
            # while the other way round they would forget it.
            for vcpu, saved in zip(self._board.vcpus, vcpus, strict=True):
                snapshot.restore_vcpu(vcpu, self._vm, saved)
            snapshot.restore_vm(self._vm, vm)
            self._power.load(parts.power)
            self._com1.load(parts.com1)
            self._broken = ""

    def serial_input(self, data: bytes) -> None:
        """Feed the console; what its bounded buffer can't take is dropped, as by a port without flow control."""
        if self._closed:
            return
        taken = self._com1.input(data)
        if taken < len(data):
            log.warning("serial input: %d bytes dropped, the guest does not read them", len(data) - taken)

    def close(self) -> None:
        """Stop the vCPUs and give all resources back; idempotent. Not to be called from ``on_stopped``."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with self._end_lock:
                self._ended = True  # nothing that happens from here on is the guest's own end
            for thread in self._threads:
                thread.request_stop()
            stuck: AmigError | None = None
            for thread in self._threads:
                try:
                    thread.stop()
                except HostError as error:
                    stuck = error
            if stuck is None:
                self._vm.close()
            self.memory.close()
            if stuck is not None:
                raise stuck

    def _is_a_machine(self) -> Machine:
        return self  # for the type checker: every promise of the seam is kept

    def _load_kernel(self, kvm: Kvm, boot: BootConfig, image: bytes) -> None:
        if image.startswith(elf.MAGIC):
            plan = boot_pvh.load(self.memory, boot, image, vcpus=self.vcpus, tsc_khz=self._board.tsc_khz)
        elif boot_linux.is_linux(image):
            check_kernels_run(kvm)
            plan = boot_linux.load(self.memory, boot, image, vcpus=self.vcpus)
        else:
            raise BootError(f"{boot.kernel} is neither an ELF image with a PVH note nor a Linux bzImage")
        kvm_board.prepare(self._board.vcpus, plan.entries)
        self.boot_plan = plan

    def _check_announced(self, vcpu: Vcpu, saved: vcpu_state.VcpuState) -> None:
        """Raise `VerifyFailed` for a processor with more than the description said that it has."""
        entries = saved.cpuid_entries()
        if entries == vcpu.cpuid:  # as it was described, to the bit: a guest that waits is spared the rest
            return
        # Neither alone will do: a software KVM shows the host's processor in one mode and what it was given in another.
        extra = set(compatible(entries, self._model.entries)) & set(compatible(entries, self._board.seen))
        if extra:
            raise VerifyFailed(f"the device state has features that were not announced: {', '.join(sorted(extra))}")

    def _check_open(self) -> None:
        if self._closed:
            raise HostError("this machine is closed")

    def _request_pause(self) -> None:
        for thread in self._threads:
            thread.request_pause()

    # on vCPU threads

    def _vcpu_stopped(self, stopped: Stopped) -> None:
        with self._end_lock:
            if self._ended:
                return
            self._ended = True
        self._request_pause()
        if self.on_stopped is not None:
            self.on_stopped(None if stopped.in_order else stopped.error())

    def _workload_ended(self, verdict: int) -> None:
        if self.on_workload_end is not None:
            self.on_workload_end(verdict)

    def _com1_interrupt(self, level: bool) -> None:
        with contextlib.suppress(KvmError) if self._closed else contextlib.nullcontext():
            self._vm.irq_line(COM1_IRQ, level)

    def _peek(self, gpa: int, length: int) -> bytes | None:
        try:
            return self.memory.read(gpa, length)
        except AmigError:
            return None
