"""Starting a host that outlives the command: `--detach` returns when the guest runs, or says why it does not.

The parent spawns the same program again in a session of its own, with its output in a log file, and one end of a pipe.
The child says one thing through it, as JSON: that it is ready, with whatever the parent wants to print, or the error
that ended it. If it dies without a word, the end of its log is the explanation.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from amig.errors import AmigError, HostError
from amig.host.record import state_dir

READY_FD = "AMIG_READY_FD"
"""Environment variable that names the child's end of the pipe."""
FIRST_DESCRIPTOR = 4
"""Number of the first descriptor that the child is given."""
MAX_MESSAGE = 64 << 10
_LOG_TAIL = 2000


class Ready(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a detached host says: ``error`` empty means that it is up."""

    pid: int
    info: dict[str, str] = {}
    error: str = ""
    exit_code: int = 0


class DetachFailed(HostError):
    """The detached host did not come up; the text is its own, and so is the exit code."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def log_path(name: str) -> Path:
    """Return where a detached host of that name writes its log; makes the directory."""
    directory = state_dir() / "log"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"can't make {directory} for a log: {error.strerror}") from error
    return directory / f"{name}.log"


def start_detached(
    arguments: Sequence[str],
    *,
    log: Path,
    timeout: float = 120.0,
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> Ready:
    """Run ``python ARGUMENTS`` detached and wait until it says that it is up; returns what it said. Blocks.

    ``arguments`` follow the interpreter, as in ``["-m", "amig", "run", "web1"]``, without ``--detach``. The child has
    ``descriptors`` as `FIRST_DESCRIPTOR` and the numbers after it.
    Raises `DetachFailed` with the child's own words and exit code; it has ended then. An exception while waiting
    (Ctrl-C) ends it too. Works without a child watcher and leaves nothing to be waited for.
    """
    reader, writer = os.pipe()
    given: list[int] = []
    try:
        # numbers that no file action below uses, whatever the parent has open
        beyond = FIRST_DESCRIPTOR + len(descriptors) + 10
        high = fcntl.fcntl(writer, fcntl.F_DUPFD_CLOEXEC, beyond)
        os.close(writer)
        writer = high
        given.extend(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, beyond) for fd in descriptors)
        try:
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, *arguments],
                {**os.environ, **(environment or {}), READY_FD: "3"},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.fspath(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                    (os.POSIX_SPAWN_DUP2, writer, 3),
                    # what a shell or a test runner left open would keep their pipes from ending
                    *((os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable()),
                    *((os.POSIX_SPAWN_DUP2, fd, FIRST_DESCRIPTOR + at) for at, fd in enumerate(given)),
                ],
                setsid=True,
            )
        except OSError as error:
            raise HostError(f"can't start a detached host (log {log}): {error.strerror}") from error
        os.close(writer)
        writer = -1
        try:
            ready = _wait(reader, timeout)
        except BaseException:
            _end(pid)
            raise
        if ready is None or ready.error:
            code = _end(pid, grace=1.0)
            text = ready.error if ready is not None else _last_words(log, code)
            raise DetachFailed(text, exit_code=ready.exit_code if ready is not None else HostError.exit_code)
        return ready
    finally:
        for fd in (reader, writer, *given):
            if fd >= 0:
                os.close(fd)


def _inheritable() -> list[int]:
    """Return the descriptors above 3 that a child would inherit."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed the directory is gone
            if int(name) > 3 and os.get_inheritable(int(name)):
                found.append(int(name))
    return found


def _wait(reader: int, timeout: float) -> Ready | None:
    """Read what the child says, to the end of the pipe or a whole message; None when it died without a word."""
    deadline = time.monotonic() + timeout
    data = b""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while not data.endswith(b"\n") and len(data) <= MAX_MESSAGE:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise HostError(f"the detached host did not come up in {timeout:g} s; it was ended")
        part = os.read(reader, MAX_MESSAGE)
        if not part:
            break
        data += part
    try:
        return msgspec.json.decode(data, type=Ready)
    except msgspec.DecodeError:
        return None


def _end(pid: int, *, grace: float = 0.0) -> int:
    """End our child and collect it; returns its status as `os.waitstatus_to_exitcode` does.

    It may end by itself for ``grace`` seconds, has five more from SIGTERM on, and is killed then.
    """
    now = time.monotonic()
    signals = [(now + grace, signal.SIGTERM), (now + grace + 5, signal.SIGKILL)]
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if signals and time.monotonic() >= signals[0][0]:
                os.kill(pid, signals.pop(0)[1])
            time.sleep(0.005)
    return 0


def _last_words(log: Path, code: int) -> str:
    try:
        tail = log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
    except OSError:
        tail = ""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"the detached host {how} before its guest ran; its log {log} " + (
        f"ends with:\n{tail}" if tail else "is empty"
    )


class ReadyPipe:
    """The child's end. `from_environment` gives None in a process that nobody detached."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def from_environment(cls) -> ReadyPipe | None:
        """Take the pipe over from the environment, so that no grandchild finds it."""
        number = os.environ.pop(READY_FD, "")
        if not number.isdigit():
            return None
        fd = int(number)
        try:
            os.set_inheritable(fd, False)
        except OSError:
            return None
        return cls(fd)

    def ready(self, **info: str) -> None:
        """Tell the parent that the guest runs."""
        self._say(Ready(pid=os.getpid(), info=info))

    def failed(self, error: BaseException) -> None:
        """Tell the parent why it does not."""
        code = error.exit_code if isinstance(error, AmigError) else 1
        text = str(error) or type(error).__name__
        self._say(Ready(pid=os.getpid(), error=text[:16384], exit_code=code))

    def _say(self, ready: Ready) -> None:
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):  # the parent has gone: nobody wants to know
            os.write(self._fd, msgspec.json.encode(ready) + b"\n")
        os.close(self._fd)
        self._fd = -1
