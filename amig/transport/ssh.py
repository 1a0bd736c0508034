"""Through ssh: starts ``amig receive --stdio`` on the far side, and speaks to it over the ssh client's own pipes.

The system's ssh does what it always does: names, keys, known hosts and jumps are those of ~/.ssh. It is never asked to
ask anybody (BatchMode): a host that is not known, or a key that an agent would have to unlock, is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shlex
import socket
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from amig.errors import AmigError, HostError, LinkLost, PeerError, Refused
from amig.transport.address import SshAddress
from amig.transport.options import LinkOptions
from amig.transport.sock import SocketConnection
from amig.transport.stdio import MAGIC

MAX_LINE: Final = 1000
KEPT_LINES: Final = 12
MAX_LINES: Final = 200
"""Lines of the far side's standard error that are passed on."""
_OPTIONS: Final = (
    "-T",
    "-x",
    "-a",
    "-oBatchMode=yes",
    "-oClearAllForwardings=yes",
    "-oControlMaster=no",
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=4",
)
_BUFFER: Final = 4 << 20
_EXIT_TIMEOUT: Final = 3.0
_NO_SSH: Final = 255
_NO_COMMAND: Final = (126, 127)
_log = logging.getLogger(__name__)


def command_line(address: SshAddress, options: LinkOptions, *, timeout: float, asking: bool = False) -> list[str]:
    """Return what is run; ``asking`` only starts what answers from records.

    Everybody can read it (ps): there is no secret in it.
    """
    where = ["-p", str(address.port)] if address.port is not None else []
    if address.user is not None:
        where += ["-l", address.user]
    patience = f"-oConnectTimeout={max(1, math.ceil(timeout))}"
    way = "--answer" if asking else "--detach"
    there = f"{options.remote_amig} receive --stdio {way} --name {shlex.quote(address.name)}"
    return [*options.ssh, *_OPTIONS, patience, *where, "--", address.host, there]


async def connect(address: SshAddress, options: LinkOptions, *, timeout: float, asking: bool = False) -> SshConnection:
    """Start ssh and wait until amig answers on the far side.

    Raises `LinkLost` (ssh did not get there), `HostError` (no ssh here, no amig there), `Refused` (amig said no there),
    `PeerError` (something else answered); within ``timeout`` seconds. Cancelling ends ssh.
    """
    connection = SshConnection.start(command_line(address, options, timeout=timeout, asking=asking), str(address))
    try:
        async with asyncio.timeout(timeout):
            await connection.greeted()
    except TimeoutError:
        connection.abort()
        raise LinkLost(f"{address} did not answer within {timeout:g} s{connection.said()}") from None
    except BaseException:
        connection.abort()
        raise
    return connection


class SshConnection(SocketConnection):
    """`Connection` over the pipes of an ssh client, which it owns."""

    def __init__(self, sock: socket.socket, peer: str, process: subprocess.Popen[bytes]) -> None:
        super().__init__(sock, peer)
        self._process = process
        assert process.stderr is not None  # noqa: S101 - as `start` has made it
        self._stderr = process.stderr.fileno()
        self._ended_it = False
        self._line = bytearray()
        self._lines = 0
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        os.set_blocking(self._stderr, False)
        self._loop.add_reader(self._stderr, self._listen)

    @classmethod
    def start(cls, command: Sequence[str], peer: str) -> SshConnection:
        """Run ``command``; raises `HostError` when there is no such program."""
        ours, theirs = socket.socketpair()
        try:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            # A session of its own: Ctrl-C is for amig, which cancels; ssh must live until that has been said.
            process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            ours.close()
            raise HostError(f"can't run {command[0]}: {error.strerror}; ssh:// needs an ssh client here") from error
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(ours, peer, process)

    async def greeted(self) -> None:
        """Wait until amig says on the far side that it is there; raises as `connect` does."""
        came = bytearray(len(MAGIC))
        try:
            await self.recv_into(came)
        except LinkLost as error:
            raise await self._explain(bytes(came[: self._received])) from error
        self._received = 0
        if came != MAGIC:
            raise PeerError(_strange(self._peer, bytes(came)) + self.said())

    async def close(self) -> None:
        """End the stream, wait a little for the far side to end, too, then for ssh."""
        try:
            await super().close()
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop the connection and end ssh; blocks for the few milliseconds that this takes."""
        super().abort()
        if self._ended_it:
            return
        self._ended_it = True
        self._listen()
        if self._stderr >= 0:
            self._deafen()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_TIMEOUT)

    def said(self) -> str:
        """Return the last lines of standard error, to stand at the end of a text."""
        return f"; it said: {' / '.join(self._kept)}" if self._kept else ""

    def _ended(self, done: int, size: int) -> LinkLost:
        self._listen()
        return LinkLost(f"{super()._ended(done, size)}{self.said()}")

    async def _explain(self, came: bytes) -> AmigError:
        """Return why amig never answered."""
        until = time.monotonic() + _EXIT_TIMEOUT
        # asyncio's own way to wait for a process wants the main thread, and every loop has another.
        while self._process.poll() is None and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        self._listen()
        code = self._process.returncode
        if came:
            return PeerError(_strange(self._peer, came) + self.said())
        if code is None or code == _NO_SSH:
            return LinkLost(f"ssh did not get to {self._peer}{self.said()}")
        if code in _NO_COMMAND:
            return HostError(
                f"{self._peer} can't run amig{self.said()}. Install it there, or say where it is (AMIG_REMOTE_PATH)"
            )
        return Refused(f"{self._peer} refused, exit code {code}{self.said()}")

    def _listen(self) -> None:
        """Take what is there of standard error."""
        while self._stderr >= 0:
            try:
                part = os.read(self._stderr, 4096)
            except BlockingIOError:
                return
            *lines, rest = (bytes(self._line) + part).split(b"\n")
            self._line = bytearray(rest[:MAX_LINE])
            for line in [*lines, *([] if part else [rest])]:
                self._say(line)
            if not part:
                self._deafen()

    def _say(self, line: bytes) -> None:
        text = "".join(c if c.isprintable() else " " for c in line[:MAX_LINE].decode(errors="replace")).strip()
        if not text:
            return
        self._kept.append(text)
        self._lines += 1
        if self._lines <= MAX_LINES:
            _log.warning("%s: %s", self._peer, text)

    def _deafen(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.remove_reader(self._stderr)
        self._stderr = -1
        assert self._process.stderr is not None  # noqa: S101 - as `start` has made it
        self._process.stderr.close()


def _strange(peer: str, came: bytes) -> str:
    return (
        f"what answered at {peer} is not amig: it began with {came[:40]!r}. Does a login script print something there? "
        "It must not when the shell is not interactive"
    )
