"""The command line under test: client commands in this process, hosts in processes of their own, simulated guests."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from amig.cli.app import main

SIMULATED = (
    "--engine", "simulator", "--workload", "check", "--memory", "64MiB", "--working-set", "16MiB", "--rate", "20MB/s",
)  # fmt: skip
TIMEOUT = 60.0


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runtime and state directories of our own."""
    for name in ("run", "state"):
        (tmp_path / name).mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@dataclass(frozen=True)
class Said:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


def amig(*words: object) -> Said:
    """Run a command to its end, in this process."""
    root = logging.getLogger()
    handlers, level, levels = root.handlers[:], root.level, {}
    for name in ("asyncio", "amig.session.reception"):
        levels[name] = logging.getLogger(name).level
    out, err = io.StringIO(), io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(word) for word in words])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
    return Said(code, out.getvalue(), err.getvalue())


def ok(*words: object) -> Said:
    """Run a command that has to succeed."""
    said = amig(*words)
    assert said.code == 0, said
    return said


def move(source: object, destination: object, *more: object) -> Said:
    """Migrate, with a downtime that such a guest always fits, on however busy a machine."""
    return ok("migrate", source, destination, "--downtime", "5s", *more)


class Process:
    """A command in a process of its own."""

    def __init__(self, words: tuple[object, ...], stdin: int) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("COV_")}
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "amig", *(str(word) for word in words)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment | {"PYTHONUNBUFFERED": "1"},
        )
        self._data = b""
        self.errors = b""

    def until(self, text: str, timeout: float = TIMEOUT) -> str:
        """Read until ``text`` has come on standard output or standard error; returns all standard output so far."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as ready:
            for stream in (self.popen.stdout, self.popen.stderr):
                assert stream is not None
                ready.register(stream, selectors.EVENT_READ)
            while text.encode() not in self._data and text.encode() not in self.errors:
                left = deadline - time.monotonic()
                assert left > 0, f"{text!r} did not come: {self._data!r} {self.errors!r}"
                for key, _ in ready.select(left):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        ready.unregister(key.fileobj)
                        assert ready.get_map(), f"it ended without {text!r}: {self._data!r} {self.errors!r}"
                    if key.fileobj is self.popen.stdout:
                        self._data += data
                    else:
                        self.errors += data
        return self._data.decode()

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def end(self, timeout: float = TIMEOUT) -> Said:
        """Wait for its end; returns all that it said."""
        out, err = self.popen.communicate(timeout=timeout)
        return Said(self.popen.returncode, (self._data + out).decode(), (self.errors + err).decode())

    @property
    def said(self) -> list[dict[str, Any]]:
        """The JSON lines so far."""
        return [json.loads(line) for line in self._data.decode().splitlines()]


@contextlib.contextmanager
def process(*words: object, stdin: int = subprocess.DEVNULL) -> Iterator[Process]:
    """Run a command in a process of its own; killed at the end of the block if it still runs."""
    started = Process(words, stdin)
    try:
        yield started
    finally:
        if started.popen.poll() is None:
            started.popen.kill()
        started.popen.communicate()


@contextlib.contextmanager
def running(name: str, *more: object) -> Iterator[Process]:
    """Host a simulated guest called ``name`` until the block ends."""
    with process("run", name, *SIMULATED, "--json", *more) as host:
        host.until('"running"')
        yield host


@contextlib.contextmanager
def receiving(name: str, address: str = "tcp://127.0.0.1:0", *more: object) -> Iterator[tuple[Process, str]]:
    """Wait for a guest; yields the process and its address."""
    with process("receive", address, "--name", name, "--json", *more) as host:
        host.until('"listening"')
        yield host, host.said[0]["listening"]


def wait(condition, what: str, timeout: float = TIMEOUT):  # type: ignore[no-untyped-def]
    """Wait until ``condition()`` is true and return what it returned."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, f"this did not happen in time: {what}"
        time.sleep(0.02)
    return result
