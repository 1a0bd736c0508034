"""Observes downtime from outside: the guest's heartbeat in both mapped memories, against this machine's clock.

A process of its own, so that nothing but the scheduler disturbs it. ``python -m amig.cli.demo_watch SOURCE
DESTINATION`` takes two control sockets, of which the second may still wait for its guest. Prints ``{"watching": …}``
once the source is mapped, and what it saw when its standard input ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
import time

import msgspec
import numpy as np
import numpy.typing as npt

from amig.cli import say
from amig.errors import AmigError, ControlError, HostError
from amig.host import guest_abi as abi
from amig.host.attach import open_guest

PAUSE = 40e-6
"""Seconds between two looks; with timer and Python less than 100 us."""
_CONNECT_PAUSE = 0.01
_PR_SET_TIMERSLACK = 29

Beats = npt.NDArray[np.uint64]


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen. All times are in milliseconds; None: not seen."""

    downtime_ms: float | None = None
    """From a vCPU's last beat at the source to its first one at the destination, of the vCPU that waited longest."""
    uncertain_ms: float | None = None
    """What the two looks at its ends may have missed of it."""
    sample_us: float = 0.0
    """Between two looks, the middle of all."""
    before_ms: float | None = None
    """The longest time without a beat before, while it ran at the source: what this machine does to it anyway."""


class Heartbeats:
    """A live view of the heartbeats of all vCPUs in mapped memory; keeps the mapping alive."""

    def __init__(self, memory: npt.NDArray[np.uint8], vcpus: int) -> None:
        self._beats: Beats = np.frombuffer(memory, abi.CPU, vcpus, abi.CPU_GPA)["heartbeat"]

    @classmethod
    async def of(cls, socket: str) -> Heartbeats:
        """Map the memory of the guest behind a control socket. Raises `ControlError` while there is none."""
        guest = await open_guest(socket, client="amig demo (observer)")
        try:
            slot = next((s for s in guest.info.memory.slots if s.guest_phys == 0 and s.size >= abi.SHARED_END), None)
            if slot is None:
                raise HostError("the guest has no memory at its beginning: it is not amig's image")
            raw = guest.memory.pages(slot.region).reshape(-1)[slot.offset : slot.offset + slot.size]
            return cls(raw, guest.info.vcpus)
        finally:
            await guest.close()

    def now(self) -> Beats:
        """Return a copy."""
        return self._beats.copy()


async def destination(socket: str, stop: threading.Event) -> Heartbeats | None:
    """Wait for a guest behind ``socket``; None when we are to stop before."""
    while not stop.is_set():
        try:
            return await Heartbeats.of(socket)
        except ControlError:
            await asyncio.sleep(_CONNECT_PAUSE)
    return None


def watch(source: Heartbeats, there: Heartbeats, stop: threading.Event) -> Observed:
    """Look until every vCPU has gone on at the destination and ``stop`` is set."""
    seen = source.now()
    last = np.full(seen.size, time.monotonic_ns())
    found = np.zeros(seen.size, np.int64)
    missed = np.zeros(seen.size, np.int64)
    longest = 0
    looks: list[int] = []
    before = time.monotonic_ns()
    while not stop.is_set():
        time.sleep(PAUSE)
        arrived = there.now()  # first: what it has copied of the source's is then never newer than what we see there
        beats = source.now()
        now = time.monotonic_ns()
        step, before = now - before, now
        moved = beats != seen
        if moved.any():
            longest = max(longest, int((now - last)[moved].max()))
            last[moved] = now
            missed[moved] = step
            seen = beats
        # The source's own beats arrive as pages; only a guest that runs there can be ahead of them.
        new = (arrived > beats) & (found == 0)
        if new.any():
            found[new] = now - last[new]
            missed[new] += step
            if found.all():
                looks.append(step)
                break
        if len(looks) < 1 << 20:
            looks.append(step)
    sample = float(np.median(looks)) / 1e3 if looks else 0.0
    if not found.all():
        return Observed(sample_us=sample, before_ms=longest / 1e6)
    slowest = int(found.argmax())
    return Observed(
        downtime_ms=int(found[slowest]) / 1e6,
        uncertain_ms=int(missed[slowest]) / 1e6,
        sample_us=sample,
        before_ms=longest / 1e6,
    )


async def _main(source_socket: str, destination_socket: str) -> None:
    stop = threading.Event()

    def until_end() -> None:
        while os.read(0, 4096):
            pass
        stop.set()

    source = await Heartbeats.of(source_socket)
    say.json_line({"watching": source_socket})
    threading.Thread(target=until_end, name="stdin", daemon=True).start()
    there = await destination(destination_socket, stop)
    say.json_line(Observed() if there is None else watch(source, there, stop))


def main() -> None:
    """Run the observer."""
    # Sleeps of microseconds are rounded up by the timer slack, 50 us unless said otherwise.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    try:
        asyncio.run(_main(sys.argv[1], sys.argv[2]))
    except AmigError as error:
        say.note(f"amig: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
