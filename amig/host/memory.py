"""Guest memory: memfds shared by the process that runs the guest and the one that moves it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from amig.errors import HostError, UsageError
from amig.host import layout
from amig.host.mapping import Mapping as FileMapping
from amig.host.mapping import check_sealed, create_memfd
from amig.memory import PAGE_SIZE, MemoryMap, Pages, Slot
from amig.units import format_size

__all__ = ["MakeMemory", "MappedMemory", "MemfdMemory"]

MOST_SPARSE = 64
"""Times this machine's memory that a guest may have: what is kept about each page must not become the burden itself."""


class MappedMemory:
    """Guest memory mapped from descriptors; what a migrator has. Implements `amig.memory.GuestMemory`."""

    def __init__(self, memory_map: MemoryMap, mappings: Mapping[int, FileMapping]) -> None:
        self._map = memory_map
        self._mappings = dict(mappings)

    @classmethod
    def from_fds(cls, memory_map: MemoryMap, fds: Mapping[int, int], *, writable: bool = False) -> MappedMemory:
        """Map every region from the memfd that somebody else passed; owns the descriptors from here, also on errors.

        Raises `UsageError` for a map that makes no sense, a descriptor too few or too many, one that is too small,
        and one that isn't sealed against shrinking; `HostError` when it can't be mapped.
        """
        with contextlib.ExitStack() as undo:
            for fd in fds.values():
                undo.callback(os.close, fd)
            memory_map.check()
            if set(fds) != {r.id for r in memory_map.regions}:
                raise UsageError(f"descriptors for regions {sorted(fds)} of a guest with {len(memory_map.regions)}")
            for region in memory_map.regions:
                check_sealed(fds[region.id], region.size)
            mappings = {r.id: FileMapping(fds[r.id], r.size, writable=writable) for r in memory_map.regions}
            undo.pop_all()
        return cls(memory_map, mappings)

    @property
    def map(self) -> MemoryMap:
        """Regions and slots as they are now."""
        return self._map

    def pages(self, region: int) -> Pages:
        """Return the live memory of a region, shape ``(pages, 4096)``, no copy; an array outlives `close`."""
        return self._mapping(region).pages

    def address(self, region: int) -> int:
        """Return where a region starts in this process; valid until `close`."""
        return self._mapping(region).address

    def data_ranges(self, region: int, first: int, count: int) -> list[tuple[int, int]]:
        """Return ``(first page, pages)`` of every run of the range that is not a hole; see `GuestMemory`."""
        self._check_pages(region, first, count)
        found = self._mapping(region).data_ranges(first * PAGE_SIZE, (first + count) * PAGE_SIZE)
        # A huge page or a page cache block may start before or end after the pages asked for.
        return [(a // PAGE_SIZE, -(-b // PAGE_SIZE) - a // PAGE_SIZE) for a, b in found]

    def fds(self) -> Mapping[int, int]:
        """Return the memfd of every region, still owned by this object."""
        return {region: m.fd for region, m in self._mappings.items()}

    def close(self) -> None:
        """Let go of memory and descriptors; idempotent. Arrays that are still held stay valid."""
        for mapping in self._mappings.values():
            mapping.close()

    def _mapping(self, region: int) -> FileMapping:
        try:
            return self._mappings[region]
        except KeyError:
            raise UsageError(f"the guest has no memory region {region}") from None

    def _check_pages(self, region: int, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self._map.region(region).pages:
            raise UsageError(f"pages {first} to {first + count} leave memory region {region}")


class MemfdMemory(MappedMemory):
    """Guest memory that this process made and owns.

    ``on_write`` is called after every host-side write with ``(region, first page, pages)``, from the writing thread:
    KVM's dirty log knows only of what vCPUs write, so the host marks the rest.
    """

    def __init__(self, memory_map: MemoryMap, *, hugepages: bool = False) -> None:
        """Make a memfd for every region; raises `UsageError` or `HostError`, with nothing left behind."""
        memory_map.check()
        here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if memory_map.size > MOST_SPARSE * here:
            raise HostError(
                f"a guest of {format_size(memory_map.size)} on a machine of {format_size(here)} makes no sense"
            )
        mappings: dict[int, FileMapping] = {}
        try:
            for region in memory_map.regions:
                fd = create_memfd(f"amig-guest-{region.id}", region.size, hugepages=hugepages)
                try:
                    mappings[region.id] = FileMapping(fd, region.size, writable=True, hugepages=hugepages)
                except BaseException:
                    os.close(fd)
                    raise
        except BaseException:
            for mapping in mappings.values():
                mapping.close()
            raise
        super().__init__(memory_map, mappings)
        self.hugepages = hugepages
        self.backed = False
        """Whether all of it is known to be backed: then there is nothing to `populate`."""
        self.on_write: Callable[[int, int, int], None] | None = None

    @classmethod
    def create(cls, size: int, *, hugepages: bool = False) -> MemfdMemory:
        """Make ``size`` bytes of RAM, laid out around the hole below 4 GiB."""
        return cls(layout.memory_map(size), hugepages=hugepages)

    def readonly_fd(self, region: int) -> int:
        """Return a new read-only descriptor of a region, to be passed to another process; the caller owns it."""
        return self._mapping(region).reopen_readonly()

    def populate(self, region: int, first: int, count: int) -> bool:
        """Have the kernel back a run of pages; contents stay. Blocks (first touch costs microseconds a page).

        Returns False, having done nothing, where all memory is backed already.
        """
        self._check_pages(region, first, count)
        if count and not self.backed:
            self._mapping(region).populate(first * PAGE_SIZE, count * PAGE_SIZE)
        return not self.backed

    def punch(self, region: int, first: int, count: int) -> None:
        """Make a run of pages zero and give their memory back. Not a host-side write: marks nothing dirty."""
        self._check_pages(region, first, count)
        if count:
            self.backed = False
            self._mapping(region).punch(first * PAGE_SIZE, count * PAGE_SIZE)

    def recast(self, memory_map: MemoryMap) -> None:
        """Lay memory of one region out as another map with one, which is not larger; the rest is given back.

        For memory that was made before its guest was known. Raises `UsageError` for a map that does not fit.
        """
        memory_map.check()
        (old,) = self._map.regions
        if len(memory_map.regions) != 1 or (new := memory_map.regions[0]).size > old.size:
            raise UsageError(f"a guest of {memory_map.size} bytes does not fit memory of {old.size}")
        mapping = self._mappings[old.id]
        mapping.cut(new.size)
        self._map, self._mappings = memory_map, {new.id: mapping}

    def empty(self) -> None:
        """Give all memory back at once, whoever still holds an array over it (and reads zeros from then on)."""
        self.backed = False
        for mapping in self._mappings.values():
            if mapping.fd >= 0:
                mapping.punch(0, mapping.size)

    def locate(self, gpa: int, length: int) -> tuple[Slot, int]:
        """Return the slot that holds ``length`` bytes from guest-physical ``gpa``, and their offset in its region.

        The one check that every guest address passes. Raises `UsageError` when the range isn't all in one slot.
        """
        if gpa >= 0 and length >= 0:
            for slot in self._map.slots:
                inside = gpa - slot.guest_phys
                if inside >= 0 and inside + length <= slot.size:
                    return slot, slot.offset + inside
        raise UsageError(f"guest addresses {gpa:#x} to {gpa + length:#x} are not in the guest's memory")

    def read(self, gpa: int, length: int) -> bytes:
        """Return a copy of guest-physical memory; raises `UsageError` outside of it."""
        return self._view(gpa, length).tobytes()

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write guest-physical memory and mark the pages dirty; raises `UsageError` outside of it."""
        with self.map_range(gpa, len(data)) as view:
            view[:] = np.frombuffer(data, np.uint8)

    @contextlib.contextmanager
    def map_range(self, gpa: int, length: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Lend out guest-physical memory for writing, like QEMU's address_space_map.

        The pages are marked dirty when the block ends, however it ends: a mark before the last write would let a
        migration send the page and never look at it again.
        """
        slot, offset = self.locate(gpa, length)
        view = self._view(gpa, length)
        try:
            yield view
        finally:
            if length and self.on_write is not None:
                first = offset // PAGE_SIZE
                self.on_write(slot.region, first, (offset + length - 1) // PAGE_SIZE + 1 - first)

    def _view(self, gpa: int, length: int) -> npt.NDArray[np.uint8]:
        slot, offset = self.locate(gpa, length)
        return self.pages(slot.region).reshape(-1)[offset : offset + length]


MakeMemory = Callable[[MemoryMap], MemfdMemory]
"""Makes the memory of a guest that arrives; the caller owns it."""
