"""Atomic exchange of words in shared memory, which neither numpy nor Python has."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np

from amig.errors import HostError
from amig.memory import Words

_ACQ_REL = 4  # __ATOMIC_ACQ_REL
_LIBRARY = "libatomic.so.1"


@functools.cache
def _exchange() -> Callable[[int, int, int], int]:
    try:
        function = ctypes.CDLL(_LIBRARY).__atomic_exchange_8
    except (OSError, AttributeError) as error:
        raise HostError(
            f"a log shared with another process needs {_LIBRARY}, which comes with GCC: install it (Debian, Ubuntu: "
            "apt install libatomic1; Fedora: dnf install libatomic)"
        ) from error
    function.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)
    function.restype = ctypes.c_uint64
    return function


def require() -> None:
    """Raise `HostError`, which says what to install, unless `take` works here."""
    _exchange()


def take(words: Words, out: Words) -> bool:
    """Move all bits of ``words`` to ``out``, which has the same size; returns whether there were any.

    Each word is exchanged for 0 in one step, so that a bit which another process sets meanwhile is either in ``out`` or
    left for the next time. Words that are zero are only looked at: a log is mostly empty, and an exchange costs a
    hundred times as much.
    """
    np.copyto(out, words)  # looked at in a copy: numpy's own searches fail on arrays that change meanwhile
    busy = np.flatnonzero(out)
    if not busy.size:
        return False
    exchange = _exchange()
    base = words.ctypes.data
    out[busy] = [exchange(base + 8 * at, 0, _ACQ_REL) for at in busy.tolist()]
    return True
