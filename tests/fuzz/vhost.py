"""The log that device backends share with the host: whatever bits they set, only pages that exist become dirty."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

import numpy as np

from amig import bitmap
from amig.dirty.hub import DirtyLogHub
from amig.dirty.vhost import VhostLog
from amig.errors import AmigError
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot
from amig.sim.kernel_log import SimKernelLog

from .target import Target

HOLE = 300
MAP = MemoryMap(
    generation=1,
    regions=(Region(id=7, size=200 * PAGE_SIZE),),
    slots=(
        Slot(index=0, guest_phys=0, size=100 * PAGE_SIZE, region=7, offset=0),
        Slot(index=1, guest_phys=(HOLE + 3) * PAGE_SIZE, size=150 * PAGE_SIZE, region=7, offset=50 * PAGE_SIZE),
    ),
)


def run(data: bytes) -> None:
    log = VhostLog(MAP)
    try:
        with mmap.mmap(log.fd, log.size) as shared:
            hub = DirtyLogHub(SimKernelLog(MAP), MAP)
            hub.attach(log)
            user = hub.open("fuzz", "exact")
            with contextlib.suppress(AmigError):
                _play(user, shared, data)
            user.close()
    finally:
        log.close()


def _play(user, shared: mmap.mmap, data: bytes) -> None:  # type: ignore[no-untyped-def]
    user.sync()
    user.take_and_clear(7, 0, 200, 1)
    for at in range(0, len(data), 64):
        part = data[at : at + 64]
        shared[: len(part)] = part
        expected = _pages(part)
        found = user.sync()[7]
        assert set(bitmap.to_pages(found).tolist()) == expected, "other pages than were logged"
        if part[:1] > b"\x7f":
            user.take_and_clear(7, 0, 200, 1)
        else:
            user.take_and_clear(7, 0, 128, 1)
            user.take_and_clear(7, 128, 72, 1)


def _pages(part: bytes) -> set[int]:
    """The pages of the region that bits of guest-physical pages speak of."""
    found = set()
    for page in np.flatnonzero(np.unpackbits(np.frombuffer(part, np.uint8), bitorder="little")).tolist():
        for slot in MAP.slots:
            inside = page - slot.guest_phys // PAGE_SIZE
            if 0 <= inside < slot.pages:
                found.add(inside + slot.offset // PAGE_SIZE)
    return found


def seeds() -> Iterator[tuple[str, bytes]]:
    yield "nothing", bytes(64)
    yield "one", b"\1" + bytes(63)
    yield "both-places", b"\0" * 7 + b"\xff" + b"\0" * 30 + b"\x0f" + bytes(25)
    yield "all", b"\xff" * 64
    yield "two-rounds", b"\x55" * 64 + b"\xaa" * 64


TARGET = Target(name="vhost", run=run, seeds=seeds, most=256, memory=4 << 20)
