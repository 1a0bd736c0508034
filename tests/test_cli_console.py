"""`amig console` on a real terminal (a pty): raw keys, Ctrl-], and a guest that moves away meanwhile."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.commands import SIMULATED, homes, move, ok, process, receiving, running

__all__ = ["homes"]

pytestmark = pytest.mark.usefixtures("homes")


class Terminal:
    """A pty with a command on it."""

    def __init__(self, *words: str) -> None:
        self.ours, theirs = pty.openpty()
        self._theirs = theirs
        environment = {key: value for key, value in os.environ.items() if not key.startswith("COV_")}
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "amig", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=environment | {"TERM": "xterm"},
        )
        self.seen = b""

    def until(self, text: bytes, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while text not in self.seen:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.ours], [], [], max(left, 0))
            assert ready, f"{text!r} did not come: {self.seen!r}"
            self.seen += os.read(self.ours, 1 << 16)

    def type(self, data: bytes) -> None:
        os.write(self.ours, data)

    @property
    def cooked(self) -> bool:
        """Whether lines are edited and echoed, as a shell expects."""
        mode = termios.tcgetattr(self._theirs)[3]
        return bool(mode & termios.ICANON and mode & termios.ECHO and mode & termios.ISIG)

    def end(self) -> int:
        return self.popen.wait(60)

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        os.close(self.ours)
        os.close(self._theirs)


@contextmanager
def terminal(*words: str) -> Iterator[Terminal]:
    opened = Terminal(*words)
    try:
        yield opened
    finally:
        opened.close()


def test_keys_reach_the_guest_and_its_output_the_terminal() -> None:
    with running("a"), terminal("console", "a") as screen:
        screen.until(b"connected to a; Ctrl-] leaves")
        screen.until(b"ready")  # what it wrote before comes first
        assert not screen.cooked
        screen.type(b"hello \x03\x04\x1a guest")  # the simulated guest echoes; Ctrl-C, -D and -Z are keys as any
        screen.until(b"hello \x03\x04\x1a guest")
        screen.type(b"last words\x1dnever sent")
        screen.until(b"left a, which goes on")
        assert screen.end() == 0
        assert screen.cooked, "the terminal is as it was"
        assert b"never" not in screen.seen
        assert ok("status", "a", "--json").lines[0]["consoles"] == 0


def test_it_says_where_the_guest_went() -> None:
    with running("a"), receiving("b") as (_, address), terminal("console", "a") as screen:
        screen.until(b"connected")
        move("a", address)
        screen.until(f"a: moved to {address}".encode())
        assert screen.end() == 0
        assert screen.cooked


def test_two_terminals_see_the_same() -> None:
    with running("a"), terminal("console", "a") as first, terminal("console", "a", "--no-replay") as second:
        first.until(b"ready")
        second.until(b"connected")
        while ok("status", "a", "--json").lines[0]["consoles"] < 2:
            pass
        first.type(b"seen by both")
        first.until(b"seen by both")
        second.until(b"seen by both")
        assert b"ready" not in second.seen


def test_a_signal_leaves_the_terminal_in_order() -> None:
    with running("a"), terminal("console", "a") as screen:
        screen.until(b"ready")
        screen.popen.terminate()
        assert screen.end() == 143
        assert screen.cooked


def test_a_host_that_dies_is_told_from_one_that_ends() -> None:
    with running("a") as host, process("console", "a") as console:
        console.until("ready")
        host.popen.kill()
        said = console.end()
        assert said.code == 33
        assert "did it crash?" in said.err


def test_input_from_a_file_is_fed_and_its_end_changes_nothing() -> None:
    reader, writer = os.pipe()
    with running("a") as host, process("console", "a", stdin=reader) as console:
        os.close(reader)
        os.write(writer, b"from a pipe\x1d")
        os.close(writer)
        console.until("from a pipe\x1d")
        ok("stop", "a")
        said = console.end()
        assert said.code == 0
        assert "stopped by an operator" in said.err
        assert host.end().code == 0


def test_a_guest_in_the_foreground_has_the_terminal() -> None:
    with terminal("run", "a", *SIMULATED, "--serial", "stdio") as screen:
        screen.until(b"Ctrl-] ends it")
        screen.type(b"\x03 typed")
        screen.until(b"\x03 typed")
        screen.type(b"\x1d")
        assert screen.end() == 130
        assert screen.cooked
