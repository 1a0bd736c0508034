"""A thread that answers: the scheduler is asked to let it run as soon as it has something to do.

A migration's last rounds are a few hundred pages each, and its pause is a dozen short steps of three processes. Where
the processors are busy a thread that wakes up for such a step waits for the slice of whoever runs, milliseconds each
time, in which the guest writes more pages than the round has sent. Linux 6.12 and later take a slice for each thread:
one that asks for a short one gets its turn earlier, and no more time in all than its share. Older kernels do as before.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

SLICE_NS: Final = 100_000
"""The shortest that Linux gives."""
_SCHED_SETATTR: Final = 314  # x86-64, asm/unistd_64.h
_ATTR: Final = struct.Struct("<IIQiIQQQ")
"""struct sched_attr, linux/sched/types.h: size, policy, flags, nice, priority, runtime, deadline, period."""

_libc = ctypes.CDLL(None, use_errno=True)


def be_prompt() -> bool:
    """Ask for short slices for the calling thread, and those it starts; returns whether the kernel took it.

    A thread with another policy than the ordinary one is left alone. Needs no privilege, and its niceness stays.
    """
    return _ask_for(SLICE_NS)


def be_patient() -> bool:
    """Undo what the calling thread has inherited from one that is prompt: for those that compute."""
    return _ask_for(0)


def _ask_for(slice_ns: int) -> bool:
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTR.pack(_ATTR.size, os.SCHED_OTHER, 0, nice, 0, slice_ns, 0, 0)
    refused: int = _libc.syscall(_SCHED_SETATTR, 0, attributes, 0)
    return not refused
