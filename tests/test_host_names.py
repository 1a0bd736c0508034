"""Names, locks and sockets of hosts."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from amig.errors import HostError, NameTaken, NoSuchGuest, UsageError
from amig.host.names import NameLock, check_name, live_hosts, resolve, runtime_dir


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "amig"


def listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.fspath(path))
    sock.listen()
    return sock


@pytest.mark.parametrize("name", ["a", "web1", "Web-1.example_2", "x" * 63, "0"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "x" * 64, "ä", "a\0"])
def test_no_names(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


def test_a_name_has_one_host(runtime: Path) -> None:
    lock = NameLock.take("web1")
    with pytest.raises(NameTaken, match=f"process {os.getpid()}"):
        NameLock.take("web1")
    other = NameLock.take("web2")
    other.close()
    lock.close()
    lock.close()
    NameLock.take("web1").close()
    assert os.listdir(runtime) == []


def test_a_host_that_was_killed_leaves_its_name_free(runtime: Path) -> None:
    script = (
        "import os, socket\nfrom amig.host.names import NameLock\nlock = NameLock.take('web1')\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(str(lock.socket_path)); s.listen()\nos.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert (runtime / "web1.sock").exists()
    assert list(live_hosts()) == []
    with pytest.raises(NoSuchGuest):
        resolve("web1")
    lock = NameLock.take("web1")
    assert not lock.socket_path.exists()
    lock.close()


def test_living_hosts_are_listed_and_found(runtime: Path) -> None:
    one, two = NameLock.take("b"), NameLock.take("a")
    with listen(one.socket_path), listen(two.socket_path):
        (runtime / "not a name.sock").touch()
        (runtime / "dead.sock").touch()
        assert [name for name, _ in live_hosts()] == ["a", "b"]
        assert resolve("a") == two.socket_path
        assert resolve(str(two.socket_path)) == two.socket_path
        with pytest.raises(NoSuchGuest, match="there are: a, b"):
            resolve("c")
    one.close()
    two.close()
    with pytest.raises(NoSuchGuest, match="none is"):
        resolve("a")
    with pytest.raises(NoSuchGuest):
        resolve("/nowhere/x.sock")


def test_a_socket_path_too_long_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(UsageError, match="XDG_RUNTIME_DIR"):
        NameLock.take("web1")
    with pytest.raises(UsageError, match="at most 107"):
        resolve("/" + "x" * 200)


def test_without_the_variable_a_directory_of_our_own_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import amig.host.names as names

    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(names, "_is_ours", lambda _: False)
    monkeypatch.setattr(names.tempfile, "gettempdir", lambda: str(tmp_path))
    path = runtime_dir(create=True)
    assert path == tmp_path / f"amig-{os.geteuid()}"
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o755)
    with pytest.raises(HostError, match="0700"):
        runtime_dir()
    path.rmdir()
    (tmp_path / "trap").mkdir(mode=0o700)
    path.symlink_to(tmp_path / "trap")
    with pytest.raises(HostError, match="not a directory of our own"):
        runtime_dir(create=True)


def test_the_users_directory_comes_before_the_temporary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import amig.host.names as names

    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(names, "_is_ours", lambda _: True)
    assert runtime_dir() == Path(f"/run/user/{os.geteuid()}/amig")


def test_a_lock_on_a_file_that_was_just_removed_is_worth_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    first = NameLock.take("web1")
    flock = fcntl.flock

    def late(fd: int, how: int) -> None:
        first.close()  # between the other's open and its lock
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second = NameLock.take("web1")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fspath(second.socket_path.parent.parent))
    with pytest.raises(NameTaken):
        NameLock.take("web1")
    second.close()


async def test_many_who_want_one_name(runtime: Path) -> None:
    def take() -> NameLock | None:
        try:
            return NameLock.take("web1")
        except NameTaken:
            return None

    for _ in range(20):
        locks = [lock for lock in await asyncio.gather(*(asyncio.to_thread(take) for _ in range(8))) if lock]
        assert len(locks) == 1
        locks[0].close()
