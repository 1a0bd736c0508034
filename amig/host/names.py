"""Where hosts of guests are found: one directory, one socket and one lock for each name.

The directory is $XDG_RUNTIME_DIR/amig. Where that variable is unset: /run/user/UID/amig if that user directory exists
and is ours, else amig-UID in the directory for temporary files, made with mode 0700 and refused when it is anybody
else's. All sides must agree, so nothing else is tried.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from amig.control.link import check_socket_path
from amig.errors import HostError, NameTaken, NoSuchGuest, UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str) -> str:
    """Return a guest's name; raises `UsageError` unless it is 1 to 63 of A-Z a-z 0-9 . _ - and begins well."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a guest: it takes 1 to 63 letters, digits, '.', '_' or '-', and begins with a "
            "letter or digit"
        )
    return name


def runtime_dir(*, create: bool = False) -> Path:
    """Return the directory of sockets and locks; raises `HostError` when it can't be trusted or made."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    uid = os.geteuid()
    user_dir = Path(f"/run/user/{uid}")
    if base.startswith("/"):
        path = Path(base) / "amig"
    elif _is_ours(user_dir):
        path = user_dir / "amig"
    else:
        path = Path(tempfile.gettempdir()) / f"amig-{uid}"
    if create:
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise HostError(f"can't make {path} for control sockets: {error.strerror}; set XDG_RUNTIME_DIR") from error
    if path.exists() or path.is_symlink():
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid:
            raise HostError(f"{path} is not a directory of our own: remove it, or set XDG_RUNTIME_DIR")
        if status.st_mode & 0o077:
            raise HostError(f"{path} is open to other users: chmod 0700 it, or set XDG_RUNTIME_DIR")
    return path


def _is_ours(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


class NameLock:
    """The right to host a guest of one name, held until `close` or the process's end (flock(2))."""

    def __init__(self, name: str, directory: Path, fd: int) -> None:
        self.name = name
        self.socket_path = directory / f"{name}.sock"
        self._lock_path = directory / f"{name}.lock"
        self._fd = fd

    @classmethod
    def take(cls, name: str) -> NameLock:
        """Become the host of that name; raises `NameTaken` while another lives. A dead one's socket is removed."""
        directory = runtime_dir(create=True)
        path = directory / f"{check_name(name)}.lock"
        check_socket_path(directory / f"{name}.sock")
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _same(fd, path):  # its last holder removed it between our open and our lock
                    os.close(fd)
                    continue
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            except BaseException as error:
                owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
                os.close(fd)
                if isinstance(error, OSError) and error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise NameTaken(
                        f"a host of a guest named {name} is alive (process {owner or 'unknown'}): choose another name, "
                        f"or stop it with: amig stop {name}"
                    ) from None
                raise
            lock = cls(name, directory, fd)
            lock.socket_path.unlink(missing_ok=True)  # nobody else may have bound it while we hold the lock
            return lock

    def close(self) -> None:
        """Remove socket and lock, and let the name go. Idempotent."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            self.socket_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._lock_path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1


def _same(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def live_hosts() -> Iterator[tuple[str, Path]]:
    """Yield name and socket of every host that accepts connections, sorted by name."""
    directory = runtime_dir()
    if not directory.is_dir():
        return
    for path in sorted(directory.glob("*.sock")):
        if _NAME.fullmatch(path.stem) and _listens(path):
            yield path.stem, path


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(os.fspath(path))
        except BlockingIOError:  # a full backlog is somebody's
            return True
        except OSError:
            return False
        return True


def resolve(source: str) -> Path:
    """Return the control socket of a guest given by name or by its socket's path.

    Raises `NoSuchGuest` when no host lives there, `UsageError` for what is neither.
    """
    if "/" in source:
        path = Path(source)
        check_socket_path(path)
        if not _listens(path):
            raise NoSuchGuest(f"no guest host listens at {source}")
        return path
    path = runtime_dir() / f"{check_name(source)}.sock"
    check_socket_path(path)
    if not _listens(path):
        names = ", ".join(name for name, _ in live_hosts())
        raise NoSuchGuest(f"no guest named {source} is hosted here; " + (f"there are: {names}" if names else "none is"))
    return path
