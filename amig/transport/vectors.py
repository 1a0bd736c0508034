"""readv and writev on addresses instead of Python buffers: see `amig.pieces` for why."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

import numpy as np

from amig.pieces import Vectors

IOV_MAX: Final = 1024
"""Pieces that one call takes (Linux, UIO_MAXIOV)."""

_libc = ctypes.CDLL(None, use_errno=True)
_ARGUMENTS = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_writev, _readv = _libc.writev, _libc.readv
_writev.argtypes = _readv.argtypes = _ARGUMENTS
_writev.restype = _readv.restype = ctypes.c_ssize_t


class Transfer:
    """What is still to be moved of some vectors, on a non-blocking descriptor.

    The memory that the vectors name must stay mapped until it is done: whoever made them holds it.
    """

    __slots__ = ("_at", "_base", "_done", "_ends", "_head", "_rows", "size")

    def __init__(self, vectors: Vectors, head: bytes = b"") -> None:
        """``head`` goes first."""
        rows = np.empty((len(vectors) + bool(head), 2), np.uint64)  # a copy: the row under way is moved on
        rows[len(rows) - len(vectors) :] = vectors
        if head:
            self._head = np.frombuffer(head, np.uint8)
            rows[0] = self._head.ctypes.data, len(head)
        self._rows = rows
        self._base = rows.ctypes.data
        self._ends = np.cumsum(rows[:, 1], dtype=np.int64)
        self._at = 0
        self._done = 0
        self.size = int(self._ends[-1]) if len(rows) else 0

    @property
    def left(self) -> int:
        """Bytes still to be moved."""
        return self.size - self._done

    def write(self, fd: int) -> int:
        """Give the kernel as much as it takes; returns how much. Raises `BlockingIOError` and other `OSError`."""
        return self._move(_writev, fd)

    def read(self, fd: int) -> int:
        """Take as much as there is; returns how much, 0 at the end of the stream. Raises as `write`."""
        return self._move(_readv, fd)

    def _move(self, call: ctypes._NamedFuncPointer, fd: int) -> int:
        while True:
            moved: int = call(fd, self._base + self._at * 16, min(len(self._rows) - self._at, IOV_MAX))
            if moved >= 0:
                break
            error = ctypes.get_errno()
            if error != errno.EINTR:
                raise OSError(error, os.strerror(error))
        self._done += moved
        if self._done < self.size and moved:
            rows = self._rows
            at = int(np.searchsorted(self._ends, self._done, side="right"))
            left = int(self._ends[at]) - self._done
            rows[at, 0] += rows[at, 1] - np.uint64(left)
            rows[at, 1] = left
            self._at = at
        return moved
