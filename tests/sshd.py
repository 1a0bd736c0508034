"""An sshd of our own on a free port, with keys of its own, for this user alone."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from amig.transport import LinkOptions

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin:" + os.environ.get("PATH", ""))
ROOT = Path(__file__).parent.parent


@dataclass
class Far:
    """The far side of ssh: a machine of its own, as far as amig can tell."""

    folder: Path
    port: int
    config: Path
    """Of the client."""
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    options: LinkOptions = field(default_factory=LinkOptions)

    def address(self, name: str) -> str:
        return f"ssh://far/{name}"

    def amig(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command there, not through ssh."""
        return subprocess.run(
            [sys.executable, "-m", "amig", *words],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | self.environment,
            cwd=ROOT,
        )

    def log(self, name: str) -> str:
        return (self.folder / "state" / "amig" / "log" / f"{name}.log").read_text()

    def connections(self) -> list[str]:
        """The processes of sshd that serve a connection."""
        children = subprocess.run(["ps", "--ppid", str(self.process.pid), "-o", "pid="], capture_output=True, text=True)
        return children.stdout.split()


def problem() -> str | None:
    """Why there can be no sshd here, or None."""
    if SSHD is None:
        return "no sshd here (Debian: openssh-server)"
    if shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        return "no ssh client here (Debian: openssh-client)"
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        if not os.path.isdir("/run/sshd"):
            return "sshd wants /run/sshd, which can't be made"
    return None


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Far]:
    """Run sshd until the block ends; skips the test, with the reason, where that can't be."""
    if why := problem():
        pytest.skip(why)
    folder.mkdir(mode=0o700)
    for part in ("run", "state", "home"):
        (folder / part).mkdir(mode=0o700)
    for key in ("host", "user", "nobody"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        "XDG_RUNTIME_DIR": str(folder / "run"),
        "XDG_STATE_HOME": str(folder / "state"),
        "PYTHONPATH": str(ROOT),
    }
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin yes\nPrintMotd no\nPrintLastLog no\n"
        f"SetEnv {' '.join(f'{key}={value}' for key, value in environment.items())}\n"
    )
    host_key = (folder / "host.pub").read_text().split()[:2]
    (folder / "known").write_text(f"[127.0.0.1]:{port} {' '.join(host_key)}\n")
    config = folder / "ssh_config"
    config.write_text(
        f"Host far\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/user\n"
        f"Host stranger\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
        f"  IdentityFile {folder}/nobody\n"
        f"Host unknown\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
        f"  UserKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n  IdentityFile {folder}/user\n"
        f"Host *\n  IdentitiesOnly yes\n  IdentityAgent none\n  UserKnownHostsFile {folder}/known\n"
        "  GlobalKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    assert SSHD is not None
    log = open(folder / "sshd.log", "wb")  # noqa: SIM115 - closed below
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, (folder / "sshd.log").read_text()
            assert time.monotonic() < deadline, (folder / "sshd.log").read_text()
            time.sleep(0.01)
        yield Far(
            folder=folder,
            port=port,
            config=config,
            environment=environment,
            process=process,
            options=LinkOptions(ssh=("ssh", "-F", str(config)), remote_amig=f"{sys.executable} -m amig"),
        )
    finally:
        process.terminate()
        process.wait()
        log.close()
