"""Commands over tls, pairing and ssh: where secrets are seen, and where not; the control socket is its owner's."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from amig import errors
from amig.cli import secret
from amig.host.names import runtime_dir
from tests import sshd
from tests.commands import Process, amig, homes, ok, process, receiving, running, wait
from tests.trust import Trust, trust

__all__ = ["homes", "trust"]
pytestmark = pytest.mark.usefixtures("homes")


def migrate(*words: object, say: str = "") -> tuple[int, str, str]:
    """Run ``amig migrate`` in a process of its own, with something on its standard input."""
    done = subprocess.run(
        [sys.executable, "-m", "amig", "migrate", *map(str, words)],
        input=say,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def everything_kept(folder: Path) -> str:
    return "\n".join(p.read_bytes().decode(errors="replace") for p in folder.rglob("*") if p.is_file())


def test_a_pairing_from_shell_to_shell_leaves_its_secret_nowhere(tmp_path: Path) -> None:
    with running("a") as source, receiving("b", "--pair", "tls://127.0.0.1:0") as (destination, address):
        invitation = destination.said[0]["invitation"]
        assert invitation.startswith(f"{address}/#")
        code = invitation.rpartition(".")[2]
        log = tmp_path / "events"
        returned, out, err = migrate("a", "-", "--json", "--streams", "2", "--log", log, say=f"{invitation}\n")
        assert returned == 0, err
        ended = source.end()
        destination.until('"running"')
        assert ok("verify", "b", "--json").lines[0]["intact"]
        ok("stop", "b")
        after = destination.end()
        for text in (out, err, ended.out, ended.err, after.err, everything_kept(tmp_path)):
            assert code not in text
        assert ended.lines[-1]["destination"].startswith(f"{address}/#")


def test_a_detached_host_tells_the_secret_to_who_started_it_and_not_to_its_log(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "amig", "receive", "--pair", "tls://127.0.0.1:0", "--name", "b", "--detach"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    invitation = done.stdout.splitlines()[-1]
    assert "good once" in done.stdout
    try:
        assert invitation.rpartition(".")[2] not in everything_kept(tmp_path)
        with running("a") as source:
            assert migrate("a", "-", say=invitation)[0] == 0
            source.end()
        wait(lambda: "running" in amig("status", "b", "--json").out, "the guest runs")
    finally:
        ok("stop", "b")
    assert invitation.rpartition(".")[2] not in everything_kept(tmp_path)


def test_a_secret_on_the_command_line_is_hidden_there_and_warned_of() -> None:
    code = (
        "import sys\nfrom amig.cli.secret import read_destination\nread_destination(sys.argv[1])\n"
        "sys.stdout.write(open('/proc/self/cmdline').read())"
    )
    address = f"tls://127.0.0.1:7000/#{'A' * 43}.{'B' * 26}A"
    done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, check=True)
    assert "tls://127.0.0.1:7000/#xxxx" in done.stdout
    assert "BBBB" not in done.stdout
    assert "AAAA" not in done.stdout
    assert "write - in its place" in done.stderr
    assert "BBBB" not in done.stderr


def test_what_is_not_there_is_not_overwritten() -> None:
    before = Path("/proc/self/cmdline").read_bytes()
    secret.hide("")
    secret.hide("no such word on any command line")
    assert Path("/proc/self/cmdline").read_bytes() == before


@pytest.mark.parametrize("say", ["", "\n", "   \n"])
def test_nothing_on_standard_input_is_wrong_usage(say: str) -> None:
    returned, _, err = migrate("a", "-", say=say)
    assert returned == errors.UsageError.exit_code
    assert "standard input" in err


def test_a_broken_address_on_standard_input_is_not_repeated() -> None:
    returned, out, err = migrate("a", "-", say="tls://h:1/#AAAA.BBBBsecretBBBB\n")
    assert returned == errors.UsageError.exit_code
    assert "is not whole" in err
    assert "BBBB" not in out + err


def test_a_wrong_secret_is_refused_and_the_guest_stays() -> None:
    with running("a"), receiving("b", "--pair", "tls://127.0.0.1:0") as (destination, _):
        invitation = destination.said[0]["invitation"]
        other = invitation[:-27] + ("A" if invitation[-27] != "A" else "B") + invitation[-26:]
        returned, _, err = migrate("a", "-", say=other)
        assert returned == errors.Untrusted.exit_code, err
        assert "does not know this secret" in err
        assert '"running"' in ok("status", "a", "--json").out
        destination.until("wrong secret (1 of 5)")
        assert migrate("a", "-", say=invitation)[0] == 0
        destination.until('"running"')
        ok("stop", "b")


def test_a_pairing_address_ends_with_its_time() -> None:
    with process("receive", "--pair", "tls://127.0.0.1:0", "--name", "b", "--pair-for", "100ms") as host:
        ended = host.end()
    assert ended.code == errors.Untrusted.exit_code
    assert "nobody came within 0.1 s" in ended.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "where shall it listen"),
        (("--pair", "tcp://127.0.0.1:0"), "--pair listens on tls://"),
        (("--pair", "--stdio"), "leave ADDRESS and --pair out"),
        (("--stdio", "unix:x"), "leave ADDRESS and --pair out"),
        (("--stdio", "--json"), "leave --json"),
        (("--stdio", "--serial", "stdio"), "--serial stdio"),
        (("tls://127.0.0.1:0",), "--tls-cert"),
        (("ssh://hostb/web1",), "nothing listens on ssh"),
        (("--pair", "--pair-for", "soon"), "--pair-for"),
    ],
    ids=" ".join,
)
def test_nonsense_is_refused(
    words: tuple[str, ...], part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    said = amig("receive", *words, "--name", "b")
    assert said.code == errors.UsageError.exit_code
    assert part in said.err


def test_certificates_from_the_command_line(trust: Trust) -> None:
    files = trust.good.tls
    words = ("--tls-cert", files.cert, "--tls-key", files.key, "--tls-ca", files.ca)
    with running("a"), receiving("b", "tls://127.0.0.1:0", *words) as (destination, address):
        assert ok("migrate", "a", address, *words, "--json").lines[-1]["status"] == "completed"
        destination.until('"running"')
        ok("stop", "b")


def test_through_ssh_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd.serving(tmp_path / "far") as far:
        monkeypatch.setenv("AMIG_SSH", " ".join(far.options.ssh))
        monkeypatch.setenv("AMIG_REMOTE_PATH", far.options.remote_amig)
        with running("a") as source:
            said = ok("migrate", "a", "ssh://far/web1", "--connect-timeout", "60s")
            assert "ssh://far/web1" in said.out
            source.end()
        try:
            wait(lambda: '"running"' in far.amig("status", "web1", "--json").stdout, "it runs there")
            wait(lambda: not far.connections(), "ssh ends")
            assert '"running"' in far.amig("status", "web1", "--json").stdout
        finally:
            assert far.amig("stop", "web1").returncode == 0


# --- the control socket -----------------------------------------------------------------------------------------------


def test_the_control_socket_is_its_owners_alone() -> None:
    with running("a"):
        folder = runtime_dir()
        path = folder / "a.sock"
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        assert stat.S_IMODE(folder.lstat().st_mode) == 0o700
        assert path.lstat().st_uid == os.geteuid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_turned_away_even_where_the_modes_would_let_it_in(tmp_path: Path) -> None:
    """The modes are the first lock, the peer's uid the second: here the first is opened."""
    with running("a") as host:
        path = runtime_dir() / "a.sock"
        code = (
            "import os, socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.settimeout(20)\n"
            "os.chdir(sys.argv[1])\nos.setuid(12345)\ns.connect('a.sock')\n"
            "try: sys.stdout.write(repr(s.recv(100)))\nexcept ConnectionError: sys.stdout.write(repr(b''))"
        )
        refused = subprocess.run([sys.executable, "-c", code, path.parent], capture_output=True, text=True)
        assert "PermissionError" in refused.stderr
        path.chmod(0o666)
        path.parent.chmod(0o755)
        try:
            turned_away = subprocess.run([sys.executable, "-c", code, path.parent], capture_output=True, text=True)
            assert turned_away.stdout == "b''", turned_away.stderr
            host.until("of user 12345 is refused")
        finally:
            path.parent.chmod(0o700)
        assert isinstance(host, Process)
        with socket.socket(socket.AF_UNIX) as ours:  # its owner still gets in
            ours.connect(str(path))
        assert '"running"' in ok("status", "a", "--json").out
