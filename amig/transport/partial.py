"""The file that a snapshot grows in: private, and written by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import Final

from amig.errors import SnapshotError
from amig.units import format_size

PARTIAL: Final = ".partial"
"""Stands behind the name of the snapshot."""
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WHY: Final = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "the file system takes no file of that size",
}


def open_partial(path: str) -> int:
    """Return a descriptor of the empty, locked file ``path.partial``, mode 0600; raises `SnapshotError`.

    What a process left behind that died is taken over. The lock goes with the descriptor.
    """
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise SnapshotError(f"{path} exists and is not an ordinary file: choose another path")
    while True:
        try:
            descriptor = os.open(path + PARTIAL, _FLAGS, 0o600)
        except OSError as err:
            raise failed(path, err) from err
        try:
            if _take(descriptor, path):
                return descriptor
        except OSError as err:
            os.close(descriptor)
            raise failed(path, err) from err
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def check_space(path: str, size: int) -> None:
    """Raise `SnapshotError` when ``size`` bytes do not fit beside ``path``; a figure of this moment.

    A file system that tells no sizes, or where none can be asked, passes: writing will show.
    """
    try:
        found = os.statvfs(os.path.dirname(path) or ".")
    except OSError:
        return
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and free < size:
        raise SnapshotError(
            f"can't write the snapshot {path}: {format_size(size)} of the guest's memory are in use and "
            f"{format_size(free)} are free there; free some, choose another place, or try --compression zstd"
        )


def names(path: str, descriptor: int) -> bool:
    """Whether ``path`` is still the file that the descriptor has open."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def failed(path: str, err: OSError) -> SnapshotError:
    """Return the error for a snapshot that can't be written."""
    why = _WHY.get(err.errno or 0) or os.strerror(err.errno or 0)
    return SnapshotError(f"can't write the snapshot {path}: {why}")


def _take(descriptor: int, path: str) -> bool:
    """Lock and empty the file; False when another process removed it between open and lock."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise SnapshotError(f"{path + PARTIAL} exists and is not an ordinary file: remove it")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SnapshotError(f"another snapshot is being written to {path}: wait for it, or choose another") from None
    if not names(path + PARTIAL, descriptor):
        return False
    os.fchmod(descriptor, 0o600)
    os.ftruncate(descriptor, 0)
    return True
