"""`amig demo`: the guest moves and says how its memory is; nothing is left of it, whatever happens."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from amig import errors
from amig.cli import demo_run, demo_watch
from amig.cli.demo_watch import Heartbeats, watch
from amig.host import guest_abi as abi
from amig.kvm.system import Kvm
from tests.commands import Said, amig, process, wait

SMALL = ("--memory", "96MiB", "--working-set", "24MiB", "--rate", "50MB/s")
SIMULATED = (*SMALL, "--engine", "simulator")


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demo puts its things; it must be empty afterwards. A short path: it holds two folders and sockets."""
    with tempfile.TemporaryDirectory(prefix="amig-") as folder:
        with monkeypatch.context() as own:
            own.setenv("TMPDIR", folder)
            own.setattr(tempfile, "tempdir", None)
            own.setattr(demo_run, "SETTLE", 0.2)
            yield Path(folder)
        assert os.listdir(folder) == [], "the demo left something behind"


def gone(said: Said) -> None:
    """Assert that no process that the demo spoke of is left."""
    for pid in re.findall(r"process (\d+)", said.err):
        assert not Path(f"/proc/{pid}").exists()


def test_a_simulated_guest_moves_and_every_line_of_the_result_says_that_it_is_one() -> None:
    said = amig("demo", *SIMULATED, "--streams", "2", "--compression", "zstd")
    assert said.code == 0, said
    lines = said.out.splitlines()
    assert len(lines) > 8
    assert all(line.startswith("  simulated: ") for line in lines)
    for word in ("total time", "downtime", "rounds", "zero", "sent more than once", "on the wire", "p99", "INTACT"):
        assert word in said.out
    assert "a SIMULATED guest" in said.err
    gone(said)


@pytest.mark.kvm
def test_a_guest_on_kvm_moves_unharmed() -> None:
    said = amig("demo", *SMALL, "--engine", "kvm", "--vcpus", "2", "--json")
    assert said.code == 0, said
    report = said.lines[-1]
    assert (report["event"], report["status"], report["engine"], report["simulated"]) == (
        "demo",
        "intact",
        "kvm",
        False,
    )
    assert report["verdict"] == {"intact": True, "verified_pages": 24 * 256, "mismatches": 0, "answered": True}
    downtime = report["downtime_ms"]
    assert 0 < downtime["observed"] < report["total_ms"]
    assert downtime["guest_clock"] > 0
    assert 0 < report["migration"]["downtime_ms"] < report["total_ms"]
    assert min(report["progress_bytes_per_s"].values()) > 0
    result = report["migration"]
    assert result["status"] == "completed"
    assert result["pages"]["sent"] >= 24 * 256
    assert result["pages"]["zero"] > 0
    assert "simulat" not in said.out.replace('"simulated":false', "").lower()


@pytest.mark.parametrize("engine", ["simulator", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_a_page_that_is_never_sent_is_noticed(engine: str) -> None:
    said = amig("demo", *SMALL, "--engine", engine, "--lose-a-page")
    assert said.code == errors.VerifyFailed.exit_code
    assert "DAMAGED" in said.out
    assert "THE GUEST'S MEMORY IS DAMAGED" in said.err
    gone(said)


def test_a_migration_that_fails_is_no_success() -> None:
    said = amig("demo", *SIMULATED, "--dirty-log", "nonsense", "--json")
    assert said.code == errors.ControlError.exit_code
    report = said.lines[-1]
    assert report["status"] == "failed"
    assert "nonsense" in report["migration"]["error"]
    assert "verdict" in report
    assert report["verdict"] is None


def test_a_guest_that_can_not_work_is_said() -> None:
    said = amig("demo", "--engine", "simulator", "--memory", "64MiB", "--working-set", "1GiB")
    assert said.code == errors.HostError.exit_code
    assert "does not fit" in said.err


def without_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> Kvm:
        raise errors.KvmUnavailable("no /dev/kvm: here is what to do", request="open", errno=2)

    monkeypatch.setattr(Kvm, "open", none)


def test_without_kvm_it_says_so_and_simulates(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kvm(monkeypatch)
    said = amig("demo", *SMALL)
    assert said.code == 0
    assert "KVM can't be used here: no /dev/kvm: here is what to do" in said.err
    assert "SIMULATION" in said.err
    assert all("simulated" in line for line in said.out.splitlines())


def test_kvm_asked_for_by_name_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kvm(monkeypatch)
    said = amig("demo", *SMALL, "--engine", "kvm")
    assert said.code == errors.KvmUnavailable.exit_code
    assert not said.out


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGINT, "amig-demo"),  # while the hosts start
        (signal.SIGINT, "a SIMULATED guest"),  # while the guest fills its memory
        (signal.SIGTERM, "sending memory"),
        (signal.SIGINT, "it runs over there"),
    ],
)
def test_a_signal_ends_everything(number: signal.Signals, when: str, place: Path) -> None:
    with process("demo", *SIMULATED, "--bandwidth", "60MB/s") as demo:
        if when == "amig-demo":
            wait(lambda: list(place.glob("amig-demo-*/run")), "the demo has begun")
        else:
            demo.until(when)
        children = Path(f"/proc/{demo.popen.pid}/task/{demo.popen.pid}/children").read_text().split()
        demo.send(number)
        said = demo.end()
        assert said.code == 128 + number
        assert "Traceback" not in said.err
        for child in children:
            assert not Path(f"/proc/{child}").exists()


def test_killed_outright_its_hosts_end_by_themselves(place: Path) -> None:
    with process("demo", *SIMULATED) as demo:
        demo.until("over tcp")
        pids = re.findall(r"process (\d+)", demo.errors.decode())
        demo.popen.kill()
        demo.popen.wait()
        wait(lambda: not any(_runs(int(pid)) for pid in pids), "the hosts notice that nobody holds their lifeline")
    for left in place.glob("amig-demo-*"):  # nobody was there to tidy up
        for path in sorted(left.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        left.rmdir()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


# --- the observer ----------------------------------------------------------------------------------------------------


class Beating:
    """Memory of a guest of two vCPUs."""

    def __init__(self) -> None:
        self.memory = np.zeros(abi.SHARED_END, np.uint8)
        self.beats = np.frombuffer(self.memory, abi.CPU, 2, abi.CPU_GPA)["heartbeat"]
        self.view = Heartbeats(self.memory, 2)


class Clock:
    """Time that passes only between two looks, 100 us each; ``script`` is called with the number of the look."""

    def __init__(self, script: Callable[[int], None]) -> None:
        self._script = script
        self._looks = 0

    def monotonic_ns(self) -> int:
        return self._looks * 100_000

    def sleep(self, _: float) -> None:
        self._looks += 1
        self._script(self._looks)


def observed(monkeypatch: pytest.MonkeyPatch, script: Callable[[int, Beating, Beating, threading.Event], None]):  # type: ignore[no-untyped-def]
    source, there, stop = Beating(), Beating(), threading.Event()
    monkeypatch.setattr(demo_watch, "time", Clock(lambda look: script(look, source, there, stop)))
    return watch(source.view, there.view, stop)


def test_pages_that_arrive_are_not_a_guest_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(look: int, source: Beating, there: Beating, stop: threading.Event) -> None:
        there.beats[:] = source.beats  # as a round brings it
        source.beats += 1
        if look == 50:
            stop.set()

    assert observed(monkeypatch, script).downtime_ms is None


def test_downtime_is_the_longest_wait_of_any_vcpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(look: int, source: Beating, there: Beating, stop: threading.Event) -> None:
        if look <= 100:  # the last beats here, with a pause of three looks before
            source.beats += look not in (60, 61, 62)
        there.beats[0] += look >= 150 and 100 + look
        there.beats[1] += look >= 300 and 100 + look
        assert look <= 300, "both run: there is nothing more to see"

    seen = observed(monkeypatch, script)
    assert seen.downtime_ms == pytest.approx(20.0)
    assert seen.uncertain_ms == pytest.approx(0.2)
    assert seen.sample_us == pytest.approx(100)
    assert seen.before_ms == pytest.approx(0.4)
