"""Where a guest's port and memory-mapped accesses go: ranges of addresses, each with a handler."""

from __future__ import annotations

import bisect
import logging
import signal
import threading
import time
from typing import Protocol

from ..errors import UsageError
from .guest_abi import PORT_PROBE, PORT_WAIT, PROBE_MAGIC

log = logging.getLogger(__name__)

KICK_SIGNAL = signal.SIGRTMIN + 6
"""The real-time signal that ends KVM_RUN. vCPU threads block it, so that it needs no handler and harms nobody."""

LONGEST_WAIT_US = 100_000


class Handler(Protocol):
    """A device's registers. Called on the vCPU's thread; ``offset`` counts bytes from the start of its range.

    ``size`` is 1, 2, 4 or (memory only) 8. What it raises stops the guest; `GuestStop` does so in good order.
    """

    def read(self, offset: int, size: int) -> int:
        """The register's value; bits above ``size`` bytes are dropped."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """Store ``value``."""
        ...


class GuestStop(Exception):
    """Raised by a handler when the guest has switched itself off or asked for a reset; the text says which."""


def ones(size: int) -> int:
    """What a bus reads where nobody answers: all bits of ``size`` bytes."""
    return (1 << 8 * size) - 1


class PortBus:
    """The I/O ports. Unknown ports read as ones and swallow writes. Filled before the guest runs."""

    def __init__(self) -> None:
        self._table: dict[int, tuple[Handler, int]] = {}

    def add(self, first: int, count: int, handler: Handler) -> None:
        """Give ports ``first`` up to ``first + count`` to ``handler``. Raises UsageError if one is taken."""
        if first < 0 or count < 1 or first + count > 0x10000:
            raise UsageError(f"ports {first:#x} and {count - 1} more are not within 0 to 0xffff")
        ports = range(first, first + count)
        for port in ports:
            if port in self._table:
                raise UsageError(f"port {port:#x} has a handler already")
        self._table.update((port, (handler, first)) for port in ports)

    def read(self, port: int, size: int) -> int:
        """Answer IN."""
        found = self._table.get(port)
        if found is None:
            return ones(size)
        return found[0].read(port - found[1], size) & ones(size)

    def write(self, port: int, size: int, value: int) -> None:
        """Carry out OUT."""
        found = self._table.get(port)
        if found is not None:
            found[0].write(port - found[1], size, value)


class MmioBus:
    """Guest-physical addresses that are not memory. Unknown ones read as ones; each page of them is logged once."""

    MOST_LOGGED = 64
    """A guest that scans its address space must not fill the log."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, Handler]] = []
        self._logged: set[int] = set()
        self._lock = threading.Lock()

    def add(self, first: int, size: int, handler: Handler) -> None:
        """Give ``size`` bytes from ``first`` to ``handler``. Raises UsageError on overlap."""
        if first < 0 or size < 1 or first + size > 1 << 64:
            raise UsageError(f"no such range: {size:#x} bytes from {first:#x}")
        place = bisect.bisect_right(self._starts, first)
        before = self._ranges[place - 1 : place] if place else []
        after = self._ranges[place : place + 1]
        if any(end > first for _, end, _ in before) or any(start < first + size for start, _, _ in after):
            raise UsageError(f"{size:#x} bytes from {first:#x} overlap a range that has a handler")
        self._starts.insert(place, first)
        self._ranges.insert(place, (first, first + size, handler))

    def read(self, address: int, size: int) -> int:
        """Answer a load."""
        found = self._find(address)
        if found is None:
            self._unknown("read", address, size)
            return ones(size)
        return found[2].read(address - found[0], size) & ones(size)

    def write(self, address: int, size: int, value: int) -> None:
        """Carry out a store."""
        found = self._find(address)
        if found is None:
            self._unknown("write", address, size)
            return
        found[2].write(address - found[0], size, value)

    def _find(self, address: int) -> tuple[int, int, Handler] | None:
        place = bisect.bisect_right(self._starts, address) - 1
        if place < 0 or address >= self._ranges[place][1]:
            return None
        return self._ranges[place]

    def _unknown(self, what: str, address: int, size: int) -> None:
        page = address >> 12
        if page in self._logged or len(self._logged) >= self.MOST_LOGGED:
            return
        with self._lock:
            self._logged.add(page)
        log.warning(
            "guest %s of %d bytes at %#x: nothing is there; reads give ones (said once a page)", what, size, address
        )


class WaitPort:
    """The wait port of guest/amig_guest.h: a sleep that a kick ends at once; what was left of it is dropped.

    OUT32 of n to the first port waits n microseconds; IN32 from the second one tells that the first is served. It
    sleeps in `signal.sigtimedwait` on the vCPU's thread, which blocks the kick signal.
    """

    def write(self, offset: int, size: int, value: int) -> None:
        """Wait ``value`` microseconds, at most `LONGEST_WAIT_US`."""
        if offset == 0 and value:
            signal.sigtimedwait((KICK_SIGNAL,), min(value, LONGEST_WAIT_US) / 1e6)
        elif offset == 0:
            time.sleep(0)

    def read(self, offset: int, size: int) -> int:
        """The magic number at the second port."""
        return PROBE_MAGIC if offset == PORT_PROBE - PORT_WAIT else ones(size)

    def add_to(self, bus: PortBus) -> None:
        """Put it where guests look for it."""
        bus.add(PORT_WAIT, PORT_PROBE + 4 - PORT_WAIT, self)
