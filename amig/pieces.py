"""Scattered pages of guest memory as one thing: what the kernel copies out of it, or into it, piece by piece.

A block of a sparse round is hundreds of short runs. A Python object for each of them costs more than the kernel's copy
of their pages, so they stay what they are in the end: addresses and lengths, the ``iovec`` array of writev(2).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from amig.memory import PAGE_SIZE, Pages

Vectors = npt.NDArray[np.uint64]
"""Rows of (address, bytes): an array of ``struct iovec`` on every 64-bit Linux."""


class Pieces:
    """Pages of one region in ascending order; keeps their memory alive, copies nothing."""

    __slots__ = ("index", "memory", "vectors")

    def __init__(self, memory: Pages, index: npt.NDArray[np.int64]) -> None:
        """``memory`` of shape ``(pages, 4096)``; ``index`` ascends. Raises `ValueError` for pages it does not have."""
        if not memory.flags.c_contiguous or memory.shape[1] != PAGE_SIZE:
            raise ValueError("pages that do not lie one after another")
        self.memory = memory
        self.index = index
        self.vectors: Vectors = _vectors(memory, index)
        """One row for each run of consecutive pages."""

    def __len__(self) -> int:
        """Runs of consecutive pages."""
        return len(self.vectors)

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return len(self.index) * PAGE_SIZE

    def copy_to(self, out: Pages) -> memoryview:
        """Copy the pages to the start of ``out``, shape ``(at least as many, 4096)``, and return that part, flat."""
        target = out[: len(self.index)]
        if len(self.vectors) == 1:
            first = int(self.index[0])
            target[:] = self.memory[first : first + len(target)]
        elif len(self.index):
            # Not "raise", which numpy gathers by way of a hidden copy; the bounds were checked above.
            np.take(self.memory, self.index, axis=0, out=target, mode="clip")
        return target.reshape(-1).data

    def views(self) -> list[memoryview]:
        """Return a view of each run, for those who can't use addresses."""
        flat = self.memory.reshape(-1).data
        base = self.memory.ctypes.data
        return [flat[start - base : start - base + size] for start, size in self.vectors.tolist()]


def _vectors(memory: Pages, index: npt.NDArray[np.int64]) -> Vectors:
    count = len(index)
    if not count:
        return np.empty((0, 2), np.uint64)
    first, last = int(index[0]), int(index[-1])
    if first < 0 or last >= len(memory):
        raise ValueError(f"pages {first} to {last} of a memory of {len(memory)} pages")
    base = memory.ctypes.data
    if last - first + 1 == count:
        return np.array([[base + first * PAGE_SIZE, count * PAGE_SIZE]], np.uint64)
    edges = np.flatnonzero(index[1:] - index[:-1] != 1)
    edges += 1
    starts = np.empty(len(edges) + 2, np.int64)
    starts[0], starts[1:-1], starts[-1] = 0, edges, count
    rows = np.empty((len(edges) + 1, 2), np.int64)
    rows[:, 0] = index[starts[:-1]]
    rows[:, 1] = starts[1:] - starts[:-1]
    rows *= PAGE_SIZE
    rows[:, 0] += base
    return rows.view(np.uint64)
