"""A thread for each vCPU: runs the guest, serves its exits, pauses and ends on request.

A kick is the signal `KICK_SIGNAL`, sent to the thread. The thread blocks it; KVM_SET_SIGNAL_MASK lets it through only
inside KVM_RUN, where it ends the run with EINTR and stays pending; the thread then eats it with `sigtimedwait`. So no
signal handler is needed, a kick that comes just before KVM_RUN is not lost, and one that comes late does no harm.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import mmap
import signal
import threading
from collections.abc import Callable
from typing import NoReturn

from ..errors import HostError
from ..kvm.abi_numbers import ExitReason
from ..kvm.abi_run import EXIT_AT, IO_EXIT, IO_OUT, MMIO_DATA_AT, MMIO_EXIT
from ..kvm.vcpu import Vcpu
from ..promptness import be_patient
from .exits import KICK_SIGNAL, GuestStop, MmioBus, PortBus, ones
from .stopped import MemoryReader, Stopped, StopReason, describe, dump_registers

log = logging.getLogger(__name__)

_libc = ctypes.CDLL(None)
_PR_SET_TIMERSLACK = 29  # nanoseconds by which this thread's sleeps may end late; 50 us unless told otherwise
_ALL_SIGNALS = frozenset(range(1, 65)) - {32, 33}  # 32 and 33 belong to the C library


class State(enum.Enum):
    """What a vCPU's thread is doing."""

    NEW = "new"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class VcpuThread:
    """Runs one vCPU. Its methods may be called from any thread but its own; blocking ones take a time limit.

    ``on_stopped`` is called on the vCPU's thread when it ends other than by `stop`: it must not block for long.
    ``on_dirty_ring_full`` is called there when the dirty ring is full (exit 31), and again until there is room.
    ``read_memory`` lets a report of a failed instruction show its bytes.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        ports: PortBus,
        mmio: MmioBus,
        *,
        on_stopped: Callable[[Stopped], None] | None = None,
        on_dirty_ring_full: Callable[[Vcpu], None] | None = None,
        read_memory: MemoryReader | None = None,
    ) -> None:
        self.vcpu = vcpu
        self.exits = 0
        """Exits served so far."""
        self._ports = ports
        self._mmio = mmio
        self._on_stopped = on_stopped
        self._on_dirty_ring_full = on_dirty_ring_full
        self._read_memory = read_memory
        self._changed = threading.Condition()
        self._state = State.NEW
        self._want_pause = False
        self._want_stop = False
        self._interrupted = False  # the two above in one, read without the lock on each turn of the loop
        self._stopped: Stopped | None = None
        self._alive = False
        self._entered = False
        self._thread = threading.Thread(target=self._main, name=f"vcpu{vcpu.index}", daemon=True)

    # from other threads

    @property
    def state(self) -> State:
        """What the thread is doing now."""
        return self._state

    @property
    def stopped(self) -> Stopped | None:
        """How the vCPU ended; None while it has not, or after `stop`."""
        return self._stopped

    def start(self, *, paused: bool = False) -> None:
        """Start the thread, the vCPU running or ``paused``. Returns when the thread can be kicked."""
        with self._changed:
            if self._state is not State.NEW:
                raise HostError(f"vCPU {self.vcpu.index} was started before")
            self._want_pause = self._interrupted = paused
            self._thread.start()
            self._changed.wait_for(
                lambda: (
                    (self._alive and self._want_pause <= (self._state is State.PAUSED)) or self._state is State.STOPPED
                )
            )

    def kick(self) -> None:
        """Make the vCPU leave the guest, or a wait, at once; it goes on unless told otherwise."""
        with self._changed:
            self._kick_locked()

    def _kick_locked(self) -> None:
        # The thread clears _alive under the lock before it ends: its id is never used after that.
        if self._alive and self._thread.ident is not None:
            signal.pthread_kill(self._thread.ident, KICK_SIGNAL)

    def request_pause(self) -> None:
        """Ask for a pause and return; with several vCPUs ask all of them before waiting for one."""
        with self._changed:
            self._want_pause = True
            self._interrupt_locked()

    def _interrupt_locked(self) -> None:
        self._interrupted = True
        if self._state is State.RUNNING:
            self._kick_locked()
        self._changed.notify_all()

    def wait_paused(self, timeout: float = 10.0) -> None:
        """Wait until the vCPU rests, no port or memory access of it half done, so that its state can be saved.

        A vCPU that has stopped counts as resting. Raises HostError after ``timeout`` seconds, the request standing.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._state is not State.RUNNING, timeout):
                raise HostError(f"vCPU {self.vcpu.index} did not pause within {timeout:g} s: a device handler is stuck")

    def pause(self, timeout: float = 10.0) -> None:
        """`request_pause` and `wait_paused`."""
        self.request_pause()
        self.wait_paused(timeout)

    def resume(self) -> None:
        """Let a paused vCPU run on. Resuming a running or stopped one does nothing."""
        with self._changed:
            self._want_pause = False
            self._interrupted = self._want_stop
            self._changed.notify_all()
            if self._state is State.PAUSED and not self._want_stop:
                self._changed.wait_for(lambda: self._state is not State.PAUSED or self._want_pause or self._want_stop)

    def request_stop(self) -> None:
        """Ask the thread to end and return."""
        with self._changed:
            self._want_stop = True
            if self._state is State.NEW and self._thread.ident is None:
                self._state = State.STOPPED
            self._interrupt_locked()

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread; the vCPU can be closed then. Raises HostError after ``timeout`` seconds."""
        self.request_stop()
        if self._thread.ident is None:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise HostError(f"vCPU {self.vcpu.index} did not stop within {timeout:g} s: a device handler is stuck")

    # on the vCPU's thread

    def _main(self) -> None:
        stopped: Stopped | None = None
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
            self.vcpu.set_signal_mask(_ALL_SIGNALS - {KICK_SIGNAL})
            be_patient()
            _libc.prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
            with self._changed:
                self._alive = True
                self._state = State.RUNNING
                self._changed.notify_all()
            self._loop()
        except _End as end:
            stopped = end.stopped
        except GuestStop as asked:
            stopped = Stopped(index=self.vcpu.index, reason=StopReason.REQUESTED, text=str(asked))
        except Exception as error:  # a vCPU must never vanish without a word
            log.exception("vCPU %d: the host failed", self.vcpu.index)
            stopped = Stopped(
                index=self.vcpu.index,
                reason=StopReason.HOST_ERROR,
                text=f"{type(error).__name__}: {error}",
                registers=dump_registers(self.vcpu),
                cause=error,
            )
        finally:
            with self._changed:
                self._alive = False
                self._stopped = stopped
                self._state = State.STOPPED
                self._changed.notify_all()
        if stopped is not None and self._on_stopped is not None:
            try:
                self._on_stopped(stopped)
            except Exception:
                log.exception("vCPU %d: on_stopped failed", self.vcpu.index)

    def _loop(self) -> NoReturn:
        run = self.vcpu.run
        page = self.vcpu.run_page
        io = ExitReason.IO
        while True:
            while self._interrupted:
                self._rest()
            self._entered = True
            reason = run()
            if reason is io:  # the hot path: a paced guest comes here thousands of times a second
                self.exits += 1
                self._serve_io(page)
            elif reason is None:
                self._eat_kicks()
            else:
                self.exits += 1
                self._serve(reason, page)

    def _eat_kicks(self) -> None:
        while signal.sigtimedwait((KICK_SIGNAL,), 0) is not None:
            pass

    def _rest(self) -> None:
        """Pause for as long as that is wanted. Raises `_End` if the thread is to end."""
        if self._entered and not self._want_stop:
            self._complete_exit()
        with self._changed:
            if self._want_pause and not self._want_stop:
                self._state = State.PAUSED
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._want_stop or not self._want_pause)
            if self._want_stop:
                raise _End(None)
            self._state = State.RUNNING
            self._changed.notify_all()
        self._eat_kicks()

    def _complete_exit(self) -> None:
        """Finish an access that was half done: KVM takes our answer into its state only in the next KVM_RUN."""
        page = self.vcpu.run_page
        self.vcpu.set_immediate_exit(True)
        try:
            while (reason := self.vcpu.run()) is not None:
                self._serve(reason, page)
        finally:
            self.vcpu.set_immediate_exit(False)

    def _serve(self, reason: ExitReason, page: mmap.mmap) -> None:
        """Serve an exit. Raises `_End` if the vCPU can't go on."""
        if reason is ExitReason.IO:
            self._serve_io(page)
        elif reason is ExitReason.MMIO:
            self._serve_mmio(page)
        elif reason is ExitReason.INTR or reason is ExitReason.IRQ_WINDOW_OPEN:
            self._eat_kicks()
        elif reason is ExitReason.DIRTY_RING_FULL and self._on_dirty_ring_full is not None:
            self._on_dirty_ring_full(self.vcpu)
        else:
            raise _End(describe(self.vcpu, reason, self._read_memory))

    def _serve_io(self, page: mmap.mmap) -> None:
        direction, size, port, count, at = IO_EXIT.unpack_from(page, EXIT_AT)
        if direction == IO_OUT:
            write = self._ports.write
            for start in range(at, at + count * size, size):  # more than one for the string instructions
                write(port, size, int.from_bytes(page[start : start + size], "little"))
        else:
            read = self._ports.read
            for start in range(at, at + count * size, size):
                page[start : start + size] = read(port, size).to_bytes(size, "little")

    def _serve_mmio(self, page: mmap.mmap) -> None:
        address, data, size, is_write = MMIO_EXIT.unpack_from(page, EXIT_AT)
        if is_write:
            self._mmio.write(address, size, data & ones(size))
        else:
            page[MMIO_DATA_AT : MMIO_DATA_AT + size] = self._mmio.read(address, size).to_bytes(size, "little")


class _End(Exception):
    """Leaves the loop: the vCPU's thread is to end, ``stopped`` says how if it was not told to."""

    def __init__(self, stopped: Stopped | None) -> None:
        super().__init__()
        self.stopped = stopped
