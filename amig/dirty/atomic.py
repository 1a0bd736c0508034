"""Taking bits out of words that another process sets bits in at the same time: neither numpy nor Python can.

GCC's libatomic has the exchange that is needed. A minimal system lacks it; there the kernel does it: FUTEX_WAKE_OP
changes a word of user memory atomically on the way to waking nobody. That is a system call for every bit (or, where all
of 32 are set, for these), about a microsecond each.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

import numpy as np

from amig.errors import HostError
from amig.memory import Words

_ACQ_REL = 4  # __ATOMIC_ACQ_REL
_LIBRARY = "libatomic.so.1"
_SYS_FUTEX = 202  # x86-64
_FUTEX_WAKE_OP_PRIVATE = 5 | 128
_CLEAR_BIT = (3 | 8) << 28  # FUTEX_OP_ANDN of 1 << operand
_CLEAR_ALL = 3 << 28 | 0xFFF << 12  # FUTEX_OP_ANDN of -1
_ALL = 0xFFFF_FFFF

Harvest = Callable[[int, int], int]
"""``(address, bits seen)``: take the bits of a 64-bit word, at least those seen; returns what was taken."""


def take(words: Words, out: Words) -> bool:
    """Move all bits of ``words`` to ``out``, which has the same size; returns whether there were any.

    A bit that another process sets meanwhile is either in ``out`` or left for the next time. Words that are zero are
    only looked at: a log is mostly empty, and an exchange costs a hundred times as much. Raises `HostError` where
    neither way works; nothing is lost then.
    """
    np.copyto(out, words)  # looked at in a copy: numpy's own searches fail on arrays that change meanwhile
    busy = np.flatnonzero(out)
    if not busy.size:
        return False
    harvest = _harvest()
    base = words.ctypes.data
    out[busy] = [harvest(base + 8 * at, seen) for at, seen in zip(busy.tolist(), out[busy].tolist(), strict=True)]
    return True


def require() -> None:
    """Raise `HostError`, which says what to install, unless `take` works here."""
    _harvest()


@functools.cache
def _harvest() -> Harvest:
    try:
        return _by_library()
    except (OSError, AttributeError) as error:
        kernel = _by_kernel()
        word = ctypes.c_uint64(0x1_FFFF_FFFF)
        try:
            kernel(ctypes.addressof(word), 0x1_FFFF_FFFF)
            works = word.value == 0
        except OSError:
            works = False
        if not works:
            raise HostError(
                f"a log shared with another process needs {_LIBRARY}, which comes with GCC: install it (Debian, "
                "Ubuntu: apt install libatomic1; Fedora: dnf install libatomic)"
            ) from error
        return kernel


def _by_library() -> Harvest:
    exchange = ctypes.CDLL(_LIBRARY).__atomic_exchange_8
    exchange.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)
    exchange.restype = ctypes.c_uint64
    return lambda address, seen: exchange(address, 0, _ACQ_REL)


def _by_kernel() -> Harvest:
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.argtypes = (
        ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_long, ctypes.c_void_p, ctypes.c_uint32
    )  # fmt: skip
    syscall.restype = ctypes.c_long

    def change(address: int, operation: int) -> None:
        if syscall(_SYS_FUTEX, address, _FUTEX_WAKE_OP_PRIVATE, 0, 0, address, operation) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def harvest(address: int, seen: int) -> int:
        for half, bits in ((address, seen & _ALL), (address + 4, seen >> 32)):
            if bits == _ALL:
                change(half, _CLEAR_ALL)
                continue
            while bits:
                low = bits & -bits
                change(half, _CLEAR_BIT | (low.bit_length() - 1) << 12)
                bits ^= low
        return seen  # only we clear bits, so all that were seen were still there

    return harvest
