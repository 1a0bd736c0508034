"""The bitmaps that a host and one user of its dirty log share: one memfd, written by the host alone.

Every region has two runs of little-endian u64 words, each at its own page-aligned offset: ``pending``, filled by SYNC,
and ``taken``, where TAKE-AND-CLEAR leaves the words of a range at the range's own place. Which side may look at which
words changes with a message (a reply hands them over), so no word is ever written by two processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterable, Mapping

import numpy as np

from amig.control.replies import BitmapPlace
from amig.errors import ControlError
from amig.memory import MAX_REGION_BYTES, PAGE_SIZE, MemoryMap, Region, Words

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, since 5.1; not in the fcntl module of Python 3.11


def _rounded(size: int) -> int:
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def layout(regions: Iterable[Region]) -> tuple[tuple[BitmapPlace, ...], int]:
    """Return where the bitmaps of ``regions`` lie, and the size of the file in bytes."""
    places: list[BitmapPlace] = []
    end = 0
    for region in regions:
        span = _rounded(region.words * 8)
        places.append(BitmapPlace(region=region.id, words=region.words, pending=end, taken=end + span))
        end += 2 * span
    return tuple(places), end


def _views(buffer: mmap.mmap, places: Iterable[BitmapPlace], what: str) -> dict[int, Words]:
    return {
        place.region: np.frombuffer(buffer, dtype="<u8", count=place.words, offset=getattr(place, what))
        for place in places
    }


class SharedBitmaps:
    """The host's end: makes the file and writes it."""

    def __init__(self, memory: MemoryMap) -> None:
        self.places, size = layout(memory.regions)
        self._fd = os.memfd_create("amig-dirty", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size)
            self._map = mmap.mmap(self._fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            # after this mapping nobody gets another writable one
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS | _F_SEAL_FUTURE_WRITE)
        except BaseException:
            os.close(self._fd)
            raise
        self.pending = _views(self._map, self.places, "pending")
        self.taken = _views(self._map, self.places, "taken")

    def reader_fd(self) -> int:
        """Return a new read-only descriptor, the caller's to close."""
        return reopen_read_only(self._fd)

    def close(self) -> None:
        """Give the memory back; no view may be in use by another thread."""
        self.pending.clear()
        self.taken.clear()
        with contextlib.suppress(BufferError):  # a view is held somewhere: the last one to go unmaps
            self._map.close()
        os.close(self._fd)


class BitmapReader:
    """The migrator's end: the same words, read-only. Takes no ownership of ``fd``."""

    def __init__(self, fd: int, places: Iterable[BitmapPlace], memory: MemoryMap) -> None:
        places = tuple(places)
        end = _check(places, {region.id: region for region in memory.regions})
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:
            sealed = 0
        if not sealed or os.fstat(fd).st_size < end:
            # touching a mapping past the file's end would kill this process
            raise ControlError("the host's bitmaps are too short, or not sealed against shrinking", code="malformed")
        self._map = mmap.mmap(fd, end, mmap.MAP_SHARED, mmap.PROT_READ)
        self.pending = _views(self._map, places, "pending")
        self.taken = _views(self._map, places, "taken")


def _check(places: tuple[BitmapPlace, ...], regions: Mapping[int, Region]) -> int:
    """Return how many bytes the layout needs; raises `ControlError` when it does not fit the memory map."""
    seen: set[int] = set()
    end = 0
    for place in places:
        region = regions.get(place.region)
        if region is None or place.region in seen or place.words != region.words:
            raise ControlError(f"the host's bitmaps do not fit region {place.region}", code="malformed")
        seen.add(place.region)
        for offset in (place.pending, place.taken):
            if offset % PAGE_SIZE or offset > MAX_REGION_BYTES:
                raise ControlError("the host's bitmaps lie at an impossible place", code="malformed")
            end = max(end, offset + place.words * 8)
    if seen != set(regions):
        raise ControlError("the host shares no bitmap for some of its memory", code="malformed")
    return end


def reopen_read_only(fd: int) -> int:
    """Return a new descriptor of the same file that can only be read, with a file offset of its own."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
