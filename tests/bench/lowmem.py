"""The guest's own counters, in the memory of whatever process runs it: the memfd found under /proc/PID/fd."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from amig.host import guest_abi as abi

NAMES = ("/memfd:amig-guest-0", "/memfd:memory-backend-memfd")
"""What amig and QEMU call the memory at guest-physical 0."""
_U64 = 8
HEARTBEAT, TSC, WRITES = (
    (abi.CPU_GPA + abi.CPU.fields[name][1]) // _U64  # type: ignore[index]
    for name in ("heartbeat", "tsc", "writes")
)


def find(pid: int) -> str | None:
    """Return the path of the guest's memory in /proc, None while the process has none (or has gone)."""
    folder = Path(f"/proc/{pid}/fd")
    try:
        names = os.listdir(folder)
    except OSError:
        return None
    for name in names:
        try:
            if os.readlink(folder / name).startswith(NAMES):
                return str(folder / name)
        except OSError:
            continue
    return None


def held(pid: int) -> dict[tuple[int, int], int]:
    """Return the bytes that each memfd of a process holds, by device and inode; the guest's memory left out."""
    found: dict[tuple[int, int], int] = {}
    folder = Path(f"/proc/{pid}/fd")
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in names:
        try:
            link = os.readlink(folder / name)
            if link.startswith("/memfd:") and not link.startswith(("/memfd:amig-guest-", NAMES[1])):
                stat = os.stat(folder / name)
                found[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
        except OSError:
            continue
    return found


def populated(pid: int) -> int:
    """Return how many bytes of the guest's memory a process really has."""
    folder, found = Path(f"/proc/{pid}/fd"), {}
    try:
        for name in os.listdir(folder):
            if os.readlink(folder / name).startswith(("/memfd:amig-guest-", NAMES[1])):
                stat = os.stat(folder / name)
                found[stat.st_ino] = stat.st_blocks * 512
    except OSError:
        pass
    return sum(found.values())


class LowMemory:
    """The first pages of a guest, mapped read-only; survives the process that runs the guest."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, abi.SHARED_END, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        self._bytes = memoryview(self._map)
        self.words = self._bytes.cast("Q")

    @classmethod
    def of(cls, pid: int) -> LowMemory | None:
        """Map the memory of a process's guest; None while it has none."""
        path = find(pid)
        try:
            return None if path is None else cls(path)
        except OSError:
            return None

    def status(self) -> np.void:
        """Return the guest's status page."""
        return abi.parse_status(self._bytes)

    def running(self) -> bool:
        """Whether the guest's workload runs. Raises `RuntimeError` when it can't."""
        if not abi.present(self._bytes):
            return False
        status = self.status()
        if status["state"] in (abi.State.ERROR, abi.State.FAULT):
            raise RuntimeError(f"the guest can't work: {bytes(status['message']).decode(errors='replace')}")
        return bool(status["state"] == abi.State.RUNNING)
