"""`amig run`, `receive`, `migrate` and what operators ask, on simulated guests: from shells to shells."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amig import errors
from tests.commands import SIMULATED, TIMEOUT, amig, homes, move, ok, process, receiving, running, wait

__all__ = ["homes"]

pytestmark = pytest.mark.usefixtures("homes")
BUSY = ("--rate", "100MB/s")


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"tcp://127.0.0.1:{sock.getsockname()[1]}"


def names() -> list[str]:
    return [line["name"] for line in ok("list", "--json").lines]


def test_a_guest_moves_from_shell_to_shell(tmp_path: Path) -> None:
    log = tmp_path / "serial"
    with running("a", *BUSY, "--serial", f"file:{log}") as source, receiving("b") as (destination, address):
        assert destination.said == [{"listening": address}]
        said = move("a", address, "--json", "--streams", "2", "--chunk", "512KiB", "--log", tmp_path / "log")
        *events, result = said.lines
        assert {event["event"] for event in events} <= {"state", "round", "progress", "notice"}
        assert [event["state"] for event in events if event["event"] == "state"][-1] == "completed"
        assert result["status"] == "completed"
        assert result["error"] is None
        assert result["streams"] == 2
        assert result["chunk_bytes"] == 512 << 10
        assert result["engine"] == "simulator"
        for key in ("id", "total_ms", "downtime_ms", "rounds", "dirty_log", "link_bytes_per_s"):
            assert result[key], key
        assert set(result["pages"]) == {"total", "sent", "zero", "resent", "delta"}
        assert set(result["bytes"]) == {"memory", "wire"}
        assert set(result["window_ms"]) == {"p50", "p99", "max"}
        assert (tmp_path / "log").read_text() == said.out
        ended = source.end()
        assert ended.code == 0, "a host whose guest has moved away has done its work"
        assert ended.lines[-1] == {
            "event": "ended", "how": "moved", "reason": f"moved to {address}", "destination": address
        }  # fmt: skip
        destination.until('"running"')
        assert [line["phase"] for line in destination.said if line.get("event") == "phase"] == [
            "memory", "loading", "prepared"
        ]  # fmt: skip
        assert ok("verify", "b", "--json").lines[0]["intact"]
        assert "INTACT" in ok("verify", "b").out
        assert names() == ["b"]
        ok("stop", "b")
        assert destination.end().lines[-1]["how"] == "stopped"
    assert b"ready" in log.read_bytes()


def test_people_are_told_in_words() -> None:
    with (
        process("run", "a", *SIMULATED, *BUSY) as source,
        process("receive", "tcp://127.0.0.1:0", "--name", "b") as destination,
    ):
        assert "a runs on the simulator: 64 MiB, 1 vCPU" in source.until("amig status a")
        words = destination.until("on the other side").split()
        address = next(word for word in words if word.startswith("tcp://"))
        said = move("a", address)
        for part in ("downtime", "rounds", "sent more than once", "on the wire", "clear to read", "simulated"):
            assert part in said.out
        for part in ("connecting", "sending memory", "round 0", "paused", "done"):
            assert part in said.err
        assert f"a has moved to {address} and runs there" in source.end().out
        destination.until("runs here now")
        assert "b  " in ok("list").out
        destination.send(signal.SIGTERM)
        assert destination.end().code == 0
    assert "no guest is hosted here" in ok("list").err


def test_status_pause_resume_stop() -> None:
    with running("a") as host:
        status = ok("status", "a", "--json").lines[0]
        assert (status["state"], status["engine"], status["vcpus"]) == ("running", "simulator", 1)
        ok("pause", "a")
        assert "a: paused by an operator" in ok("status", "a").out
        ok("resume", "a")
        socket_path = next(line["socket"] for line in host.said if "socket" in line)
        assert "a: running" in ok("status", socket_path).out, "a socket's path is as good as a name"
        assert amig("cancel", "a").code == errors.ControlError.exit_code
        assert amig("run", "a", *SIMULATED).code == errors.NameTaken.exit_code
        ok("stop", "a")
        ended = host.end()
        assert ended.code == 0
        assert ended.lines[-1]["how"] == "stopped"


@pytest.fixture
def without_nohup() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, by children too, and a host leaves it so; the suite may run under it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("without_nohup")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_a_signal_ends_a_host_in_order(number: signal.Signals, code: int) -> None:
    with running("a") as host:
        host.send(number)
        said = host.end()
        assert said.code == code
        assert said.lines[-1] == {"event": "ended", "how": "stopped", "reason": number.name}
        assert "Traceback" not in said.err
    assert names() == []
    with running("a"):
        pass  # nothing was left that would be in the way


def test_a_host_to_which_nobody_listens_any_more_goes_on() -> None:
    with process("run", "a", *SIMULATED, "--json") as host, receiving("b") as (waiting, address):
        host.until('"running"')
        for stream in (host.popen.stdout, waiting.popen.stdout):
            assert stream is not None
            stream.close()
        move("a", address)
        assert host.popen.wait(60) == 0
        assert ok("verify", "b").code == 0
        ok("stop", "b")
        assert waiting.popen.wait(60) == 0
        for closed in (host, waiting):
            closed.popen.stdout = None


def test_a_waiting_host_can_be_stopped() -> None:
    with receiving("b") as (host, _):
        assert ok("status", "b", "--json").lines[0]["state"] == "incoming"
        ok("stop", "b")
        ended = host.end()
        assert ended.code == 0
        assert ended.lines[-1]["how"] == "stopped"


def test_a_waiting_host_ends_by_a_signal_too() -> None:
    with receiving("b") as (host, _):
        host.send(signal.SIGINT)
        assert host.end().code == 130


def test_a_host_on_a_lifeline_ends_with_it() -> None:
    reader, writer = os.pipe()
    with process("run", "a", *SIMULATED, "--json", "--lifeline", stdin=reader) as host:
        os.close(reader)
        host.until('"running"')
        os.close(writer)
        assert host.end().code == 0


def test_detached_returns_when_the_guest_runs() -> None:
    line = ok("run", "a", *SIMULATED, *BUSY, "--detach", "--json").lines[0]
    try:
        assert line["event"] == "running"
        assert ok("status", "a", "--json").lines[0]["pid"] == line["pid"]
        again = amig("run", "a", *SIMULATED, "--detach")
        assert again.code == errors.NameTaken.exit_code, "the child's own reason and exit code"
        assert "a host of a guest named a is alive" in again.err
        waiting = ok("receive", "tcp://127.0.0.1:0", "--name", "b", "--detach", "--json").lines[0]
        try:
            move("a", waiting["listening"])
            assert ok("verify", "b").code == 0
        finally:
            ok("stop", "b")
    finally:
        amig("stop", "a")
    wait(lambda: names() == [], "all hosts have gone")


def test_detached_says_why_not() -> None:
    said = amig("run", "a", "--engine", "simulator", "--workload", "check", "--working-set", "1GiB", "--detach")
    assert said.code == errors.UsageError.exit_code
    assert "does not fit" in said.err


def test_once_ends_with_the_attempt_and_without_it_the_next_is_awaited() -> None:
    with running("a", *BUSY), receiving("b", "tcp://127.0.0.1:0", "--once") as (once, address):
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert once.end().code == errors.PeerError.exit_code
        with receiving("c") as (patient, address):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as stranger:
                stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            patient.until('"failed"')
            move("a", address)
            assert ok("verify", "c").code == 0


def test_cancel_from_elsewhere_keeps_the_guest() -> None:
    with running("a", *BUSY), receiving("b") as (_, address):
        with process("migrate", "a", address, "--bandwidth", "2MB/s", "--json") as migrate:
            migrate.until('"progress"')
            assert "migrating to" in ok("status", "a").out
            assert "migrating to" in ok("list").out
            ok("cancel", "a")
            said = migrate.end()
        assert said.code == 130
        assert said.lines[-1]["status"] == "cancelled"
        assert "the guest runs on" in said.err
        status = ok("status", "a", "--json").lines[0]
        assert (status["state"], status["log_users"]) == ("running", [])
        assert status["last_migration"]["status"] == "cancelled"
        assert ok("verify", "a").code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_a_migration(number: signal.Signals) -> None:
    with running("a", *BUSY), receiving("b") as (_, address):
        with process("migrate", "a", address, "--bandwidth", "2MB/s") as migrate:
            migrate.until("sending memory")
            migrate.send(number)
            migrate.until("cancelling; the guest stays")
            assert migrate.end().code == 130
        assert ok("status", "a", "--json").lines[0]["state"] == "running"


def test_a_reader_that_does_not_read_does_not_stop_the_migration() -> None:
    full, stdout = os.pipe()
    try:
        os.set_blocking(stdout, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(stdout, b"#" * 4096):
                pass
        os.set_blocking(stdout, True)
        with running("a", *BUSY) as source, receiving("b") as (destination, address):
            words = [sys.executable, "-m", "amig", "migrate", "a", address, "--json"]
            with subprocess.Popen(words, stdout=stdout, start_new_session=True) as migrate:
                try:
                    destination.until('"running"')
                    assert source.end().code == 0
                    assert migrate.poll() is None, "it still has to say so"
                    os.close(full)
                    full = -1
                finally:
                    migrate.terminate()
                    migrate.wait(TIMEOUT)
            ok("stop", "b")
    finally:
        for descriptor in (full, stdout):
            if descriptor >= 0:
                os.close(descriptor)


def test_a_guest_that_writes_too_fast_stays_or_moves_as_asked() -> None:
    fast = ("--bandwidth", "20MB/s", "--downtime", "10ms", "--max-rounds", "2")
    with running("a", *BUSY), receiving("b") as (_, address):
        said = amig("migrate", "a", address, *fast, "--json")
        assert said.code == errors.NotConverging.exit_code
        assert said.lines[-1]["status"] == "failed"
        assert said.lines[-1]["exit_code"] == said.code
        assert "--on-timeout switch" in said.lines[-1]["error"]
        assert "--on-timeout switch" in ok("status", "a").out, "the host knows, too"
        assert ok("migrate", "a", address, *fast, "--on-timeout", "switch", "--json").lines[-1]["status"] == "completed"


def test_nobody_there() -> None:
    with running("a"):
        said = amig("migrate", "a", free_address(), "--connect-timeout", "2s")
        assert said.code in (errors.LinkLost.exit_code, errors.HostError.exit_code)
        assert "Traceback" not in said.err
        assert ok("status", "a", "--json").lines[0]["state"] == "running"


def test_a_snapshot_is_taken_live_run_and_sent_on(tmp_path: Path) -> None:
    first, second = f"file:{tmp_path}/first", f"file:{tmp_path}/second"
    with running("a", *BUSY) as host:
        move("a", first)
        assert ok("status", "a", "--json").lines[0]["state"] == "running", "a snapshot leaves the guest running"
        with process("run", "b", "--restore", first, "--json") as restored:
            restored.until('"running"')
            assert "a snapshot is a clone" in restored.errors.decode()
            assert ok("verify", "b").code == 0
        move("a", second, "--stop")
        assert host.end().lines[-1]["how"] == "moved"
    with receiving("c") as (_, address):
        move(second, address)
        assert ok("verify", "c").code == 0
    (tmp_path / "third").write_bytes(b"not a snapshot")
    assert amig("run", "d", "--restore", f"file:{tmp_path}/third").code == errors.SnapshotError.exit_code


def test_memory_leaves_the_machine_in_the_clear_only_with_insecure_and_a_warning() -> None:
    for words in (("migrate", "a", "tcp://192.0.2.1:7000"), ("receive", "tcp://0.0.0.0:0", "--name", "b")):
        said = amig(*words)
        assert said.code == errors.UsageError.exit_code
        assert "--insecure" in said.err
        assert "--pair" in said.err
    said = amig("migrate", "a", "tcp://192.0.2.1:7000", "--insecure")
    assert said.code == errors.NoSuchGuest.exit_code
    assert "amig: warning: " in said.err
    assert "unencrypted" in said.err
    with process("receive", "tcp://0.0.0.0:0", "--name", "b", "--insecure") as host:
        host.until("listening")
        assert "not encrypted" in host.errors.decode()
    assert "warning" not in amig("migrate", "a", "tcp://127.0.0.1:7000").err


def test_where_kvm_can_not_be_used_it_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from amig.host import kvm_machine

    def none(*_: object, **__: object) -> None:
        raise errors.KvmUnavailable("no /dev/kvm here", request="open", errno=2)

    monkeypatch.setattr(kvm_machine.Kvm, "open", none)
    said = amig("run", "a", "--workload", "check")
    assert said.code == errors.KvmUnavailable.exit_code
    assert "no /dev/kvm here; or go on without it: --engine simulator" in said.err


def test_the_terminal_is_the_serial_port_with_stdio() -> None:
    reader, writer = os.pipe()
    with process("run", "a", *SIMULATED, "--serial", "stdio", stdin=reader) as host:
        os.close(reader)
        host.until("ready")
        assert "a runs on the simulator" in host.errors.decode(), "words for people don't disturb the guest's"
        os.write(writer, b"echo this")
        host.until("echo this")
        os.close(writer)
        assert ok("status", "a").code == 0, "the end of the input is not the end of the guest"
        host.send(signal.SIGINT)
        assert host.end().code == 130


def test_a_log_that_breaks_does_not_stop_the_migration(tmp_path: Path) -> None:
    with running("a", *BUSY), receiving("b") as (_, address):
        said = move("a", address, "--log", "/dev/full", "--json")
        assert said.err.count("--log /dev/full: ") >= 1
        assert said.lines[-1]["status"] == "completed"


@pytest.mark.kvm
def test_on_kvm_there_and_back(tmp_path: Path) -> None:
    guest = ("--workload", "check", "--memory", "64MiB", "--working-set", "24MiB", *BUSY)
    with process("run", "a", *guest, "--vcpus", "2", "--json") as source:
        source.until('"running"')
        for name, other in (("b", "a"), ("a", "b")):
            with process("receive", f"unix:{tmp_path}/{name}.sock", "--name", name, "--detach") as detached:
                assert detached.end().code == 0
            result = move(other, f"unix:{tmp_path}/{name}.sock", "--json").lines[-1]
            assert result["engine"] == "kvm"
            assert ok("verify", name).code == 0
            if name == "b":
                assert source.end().code == 0
        status = ok("status", "a", "--json").lines[0]
        assert status["guest"]["mismatches"] == 0
        ok("stop", "a")
