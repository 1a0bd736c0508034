"""The seam inside a host: a machine that runs a guest, on KVM or simulated.

All methods block and may be called from any thread; the host calls them off its event loop and waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from amig.dirty.log import KernelLog
from amig.host.memory import MemfdMemory


class Machine(Protocol):
    """A machine with memory, vCPUs and devices.

    Life: built (paused, never run) → ``resume`` ⇄ ``pause`` → ``close``. ``load`` only before the first ``resume``.
    """

    engine: str
    """``"kvm"`` or ``"simulator"``."""
    memory: MemfdMemory
    log: KernelLog
    vcpus: int
    on_stopped: Callable[[Exception | None], None] | None
    """Called once, from any thread, when the guest ends by itself: None for a power-off, else why (`GuestError`)."""

    def describe(self) -> bytes:
        """Return what a destination needs to build the same machine, encoded; see ``build_like`` of the engine."""

    def resume(self) -> None:
        """Let the vCPUs run; nothing happens when they do, or when the guest has ended by itself."""

    def pause(self) -> None:
        """Stop the vCPUs at an instruction boundary, pending port and MMIO exits completed; idempotent.

        A guest that has ended by itself, before or meanwhile, counts as paused.
        """

    def save(self) -> bytes:
        """Return vCPU, VM and device state; the machine must be paused."""

    def load(self, state: bytes) -> None:
        """Restore what ``save`` returned; checked against its schema first (`VerifyFailed`)."""

    def serial_input(self, data: bytes) -> None:
        """Feed the console; what its bounded buffer can't take is dropped."""

    def close(self) -> None:
        """Stop everything and give all resources back; idempotent."""
