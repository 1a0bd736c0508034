"""Detached hosts: the command returns when the guest runs, or with the reason why it does not."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from amig.errors import BootError, HostError
from amig.host.detach import READY_FD, DetachFailed, ReadyPipe, log_path, start_detached


@contextlib.contextmanager
def ended(pid: int) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def script(body: str) -> list[str]:
    return [
        "-c",
        f"import os, sys, time\nfrom amig.host.detach import ReadyPipe\npipe = ReadyPipe.from_environment()\n{body}",
    ]


def test_it_returns_when_the_guest_runs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ready = start_detached(
        script("print('booting', flush=True)\npipe.ready(listening='tcp://127.0.0.1:7000')\ntime.sleep(600)"), log=log
    )
    with ended(ready.pid):
        assert ready.info == {"listening": "tcp://127.0.0.1:7000"}
        assert os.getsid(ready.pid) == ready.pid, "it would die with our terminal"
        assert os.readlink(f"/proc/{ready.pid}/fd/0") == "/dev/null"
        for number in (1, 2):
            assert os.readlink(f"/proc/{ready.pid}/fd/{number}") == str(log)
        assert log.read_text() == "booting\n"
        assert log.stat().st_mode & 0o777 == 0o600
        deadline = time.monotonic() + 30
        while os.path.exists(f"/proc/{ready.pid}/fd/3"):  # it closes the pipe after its last word
            assert time.monotonic() < deadline
            time.sleep(0.01)
        left = {os.readlink(f"/proc/{ready.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{ready.pid}/fd")}
        assert left == {"/dev/null", str(log)}, "it kept something of ours open"


def test_it_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(DetachFailed, match="not an image") as caught:
        start_detached(
            script("from amig.errors import BootError\npipe.failed(BootError('not an image\\nreally'))\nsys.exit(21)"),
            log=tmp_path / "log",
        )
    assert caught.value.exit_code == BootError.exit_code


def test_one_that_dies_without_a_word_is_explained_by_its_log(tmp_path: Path) -> None:
    with pytest.raises(DetachFailed, match=r"(?s)ended with code 3.*the last line") as caught:
        start_detached(script("print('the last line', flush=True)\nos._exit(3)"), log=tmp_path / "log")
    assert caught.value.exit_code == HostError.exit_code
    with pytest.raises(DetachFailed, match="killed by signal 9"):
        start_detached(script("os.kill(os.getpid(), 9)"), log=tmp_path / "log")


def test_one_that_says_nonsense_is_ended(tmp_path: Path) -> None:
    with pytest.raises(DetachFailed):
        start_detached(["-c", "import os, time\nos.write(3, b'hello\\n')\ntime.sleep(600)"], log=tmp_path / "log")


def test_one_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    body = f"open({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    with pytest.raises(HostError, match="did not come up"):
        start_detached(script(body), log=tmp_path / "log", timeout=2)
    if mark.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(mark.read_text()), 0)


def test_a_log_that_can_not_be_written_is_explained(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="log"):
        start_detached(script(""), log=tmp_path / "no" / "log")


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with pytest.raises(DetachFailed):
            start_detached(["-c", ""], log=tmp_path / "log")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_nobody_detached_has_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "x", "999999"):
        if value is None:
            monkeypatch.delenv(READY_FD, raising=False)
        else:
            monkeypatch.setenv(READY_FD, value)
        assert ReadyPipe.from_environment() is None
        assert READY_FD not in os.environ


def test_where_logs_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert log_path("web1") == tmp_path / "amig" / "log" / "web1.log"
    assert log_path("web1").parent.is_dir()


def test_a_parent_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    pipe = ReadyPipe(writer)
    pipe.ready()
    pipe.ready()
    pipe.failed(ValueError())
