"""Shared mappings of memfds: the few calls that Python's own modules lack, or hold the GIL in.

`mmap.madvise` keeps the GIL, and backing a gigabyte takes seconds: hence libc through ctypes, which releases it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os

import numpy as np

from amig.errors import HostError, UsageError
from amig.memory import PAGE_SIZE, Pages

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_MADV_POPULATE_WRITE = 23
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_F_ADD_SEALS = 1033
_F_GET_SEALS = 1034
_F_SEAL_SEAL = 1
F_SEAL_SHRINK = 2
_F_SEAL_GROW = 4

HUGE_PAGE = 2 << 20


def create_memfd(name: str, size: int, *, hugepages: bool = False) -> int:
    """Return a memfd of exactly ``size`` bytes, sealed against any change of size; the caller owns it.

    Raises `UsageError` for a size that huge pages can't make, `HostError` when the kernel has no room.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if hugepages:
        if size % HUGE_PAGE:
            raise UsageError(f"with huge pages guest memory must be a multiple of 2 MiB, not {size} bytes")
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    try:
        fd = os.memfd_create(name, flags)
    except OSError as e:
        raise HostError(f"can't make guest memory: {e.strerror}") from e
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, _F_ADD_SEALS, F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
    except OSError as e:
        os.close(fd)
        raise HostError(f"can't make {size} bytes of guest memory: {e.strerror}") from e
    return fd


def check_sealed(fd: int, size: int) -> None:
    """Raise `UsageError` unless ``fd`` is a file of at least ``size`` bytes that can't be made shorter.

    Touching a mapping past the file's end kills the process, so a descriptor from someone else must promise this.
    """
    try:
        actual = os.fstat(fd).st_size
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError as e:
        raise UsageError(f"a descriptor for guest memory is not a memfd: {e.strerror}") from e
    if not seals & F_SEAL_SHRINK:
        raise UsageError("a descriptor for guest memory is not sealed against shrinking (F_SEAL_SHRINK)")
    if actual < size:
        raise UsageError(f"a descriptor for {size} bytes of guest memory holds {actual}")


class Mapping:
    """A shared mapping of a whole memfd, and the descriptor, which it owns once made.

    The mapping ends when the last array over it is gone, not at `close`: an array that someone still holds stays
    valid, so that a late reader can't crash the process.
    """

    def __init__(self, fd: int, size: int, *, writable: bool, hugepages: bool = False) -> None:
        self.fd = fd
        self.size = size
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._mmap: mmap.mmap | None = mmap.mmap(fd, size, mmap.MAP_SHARED, prot)
        except OSError as e:
            if hugepages:
                raise HostError(
                    f"no huge pages free for {size >> 20} MiB of guest memory: {e.strerror}; "
                    f"write at least {size // HUGE_PAGE} more to /proc/sys/vm/nr_hugepages, or run without them"
                ) from e
            limit = "; is there a limit (ulimit -v)?" if e.errno == errno.ENOMEM else ""
            raise HostError(f"can't map {size} bytes of guest memory: {e.strerror}{limit}") from e
        self._pages: Pages | None = np.frombuffer(self._mmap, np.uint8).reshape(-1, PAGE_SIZE)

    @property
    def pages(self) -> Pages:
        """All of it, shape ``(pages, 4096)``; raises `HostError` once closed."""
        if self._pages is None:
            raise HostError("the guest's memory is closed")
        return self._pages

    @property
    def address(self) -> int:
        """Where it starts in this process."""
        return int(self.pages.ctypes.data)

    def data_ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return ``(offset, end)`` in bytes of each run between ``start`` and ``end`` that isn't a hole."""
        ranges: list[tuple[int, int]] = []
        while start < end:
            try:
                start = os.lseek(self.fd, start, os.SEEK_DATA)
                if start >= end:
                    break
                stop = min(end, os.lseek(self.fd, start, os.SEEK_HOLE))
            except OSError as e:
                if e.errno == errno.ENXIO:  # only a hole follows
                    break
                if e.errno in (errno.EINVAL, errno.ESPIPE):  # hugetlbfs can't seek: take it all for data
                    return [(start, end)]
                raise
            ranges.append((start, stop))
            start = stop
        return ranges

    def populate(self, start: int, size: int) -> None:
        """Have the kernel back a run with memory; raises `HostError` when there is none left."""
        address = self.address + start
        while _libc.madvise(address, size, _MADV_POPULATE_WRITE):
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code != errno.EINVAL:
                raise HostError(f"the system has no memory left to back {size} bytes of the guest: {os.strerror(code)}")
            # Linux before 5.14. Touching the pages would race with whoever writes them now; allocating does not.
            _check(_libc.fallocate(self.fd, 0, start, size), "fallocate")
            break

    def punch(self, start: int, size: int) -> None:
        """Make a run zero and give its memory back."""
        _check(_libc.fallocate(self.fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, start, size), "fallocate")

    def cut(self, size: int) -> None:
        """Show only the first ``size`` bytes from here on, a multiple of the page size; the rest is given back.

        The file keeps its length, which is sealed.
        """
        if size < self.size:
            self.punch(size, self.size - size)
            self._pages = self.pages[: size // PAGE_SIZE]
            self.size = size

    def reopen_readonly(self) -> int:
        """Return a new descriptor of the same memory that can't be written through; the caller owns it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Drop descriptor and mapping; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._pages = None
        if self._mmap is not None:
            with contextlib.suppress(BufferError):  # somebody holds an array: the last one to go unmaps
                self._mmap.close()
            self._mmap = None


def _check(result: int, call: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise HostError(f"{call} on guest memory failed: {os.strerror(code)}")
