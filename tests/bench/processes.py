"""What processes cost: processor time to the nanosecond, and memory that is not the guest's."""

from __future__ import annotations

import os
import time
from pathlib import Path

_SCHED_CLOCK = 2
_PAGE = os.sysconf("SC_PAGESIZE")


def cpu_s(pid: int) -> float:
    """Return the processor seconds of all threads a process has or had; 0 when it has gone.

    The clock of another process is numbered ``~pid << 3 | 2`` (clock_getcpuclockid(3)); /proc/PID/stat counts in
    hundredths of a second.
    """
    try:
        return time.clock_gettime(~pid << 3 | _SCHED_CLOCK)
    except OSError:
        return 0.0


def thread_cpu_s(pid: int) -> dict[int, float]:
    """Return the processor seconds of each thread that lives."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except (OSError, ValueError):
            continue
    return found


def busiest(before: dict[int, float], after: dict[int, float]) -> int | None:
    """Return the thread that worked most in between: the vCPU of a guest that spins."""
    return max(after, key=lambda thread: after[thread] - before.get(thread, 0.0), default=None)


def private_bytes(pid: int) -> int:
    """Return the anonymous memory of a process: neither files (its program) nor shared memory (the guest); 0: gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            resident, shared = file.read().split()[1:3]
    except OSError:
        return 0
    return (int(resident) - int(shared)) * _PAGE
