"""What `amig receive` is told of memory and logs, and what it says about them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from amig import errors
from tests.commands import amig, homes, move, ok, process, receiving, running

__all__ = ["homes"]

pytestmark = pytest.mark.usefixtures("homes")


def guest_memory(pid: int) -> int:
    """Bytes behind all guest memory of a process."""
    found = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if "amig-guest" in os.readlink(fd):
                found = max(found, fd.stat().st_blocks * 512)
        except FileNotFoundError:
            continue
    return found


def test_memory_is_ready_when_the_address_is_told_and_the_guest_gets_it() -> None:
    with running("a"), receiving("b", "tcp://127.0.0.1:0", "--memory", "96MiB") as (host, address):
        assert guest_memory(host.popen.pid) == 96 << 20
        move("a", address)
        host.until('"running"')
        assert guest_memory(host.popen.pid) == 64 << 20
        assert ok("verify", "b", "--json").lines[0]["intact"]


def test_a_guest_that_does_not_fit_what_is_ready_is_taken_and_that_is_said() -> None:
    with running("a"), receiving("b", "tcp://127.0.0.1:0", "--memory", "32MiB") as (host, address):
        move("a", address)
        host.until('"running"')
        notices = [line["text"] for line in host.said if line.get("event") == "notice"]
        assert notices == [
            "a guest of 64 MiB does not fit the 32 MiB that were prepared: they are given back, and its memory is made "
            "as it arrives"
        ]
        assert ok("verify", "b", "--json").lines[0]["intact"]


def test_memory_that_is_not_there_is_not_waited_with() -> None:
    said = amig("receive", "tcp://127.0.0.1:0", "--name", "b", "--memory", "8TiB")
    assert said.code == errors.HostError.exit_code
    assert "can't prepare 8 TiB of guest memory" in said.err
    assert ok("list", "--json").lines == []


def test_a_guest_beyond_the_limit_is_refused_on_both_sides() -> None:
    with running("a"), receiving("b", "tcp://127.0.0.1:0", "--max-memory", "32MiB") as (host, address):
        said = amig("migrate", "a", address)
        assert said.code == errors.Refused.exit_code
        assert "guest a has 64 MiB of memory, and this host takes guests of up to 32 MiB (--max-memory)" in said.err
        host.until('"failed"')
        failed = next(line for line in host.said if line.get("event") == "failed")
        assert failed["exit_code"] == errors.Refused.exit_code
        assert ok("status", "a", "--json").lines[0]["log_users"] == []


@pytest.mark.kvm
def test_a_received_guest_is_logged_by_the_ring_that_was_asked_for() -> None:
    guest = ("--workload", "check", "--memory", "64MiB", "--working-set", "16MiB", "--rate", "20MB/s", "--json")
    with process("run", "a", *guest) as source:
        source.until('"running"')
        with (
            receiving("b", "tcp://127.0.0.1:0", "--dirty-ring", "4096") as (host, address),
            receiving("c") as (last, onward),
        ):
            move("a", address)
            host.until('"running"')
            said = move("b", onward, "--dirty-log", "ring", "--json")
            assert said.lines[-1]["dirty_log"] == "ring"
            last.until('"running"')
            assert ok("verify", "c", "--json").lines[0]["intact"]


@pytest.mark.parametrize(
    "words", [("--dirty-ring", "5"), ("--memory", "x"), ("--memory", "2GiB", "--max-memory", "1GiB")]
)
def test_sizes_that_make_no_sense_are_refused_at_once(words: tuple[str, ...]) -> None:
    said = amig("receive", "tcp://127.0.0.1:0", "--name", "b", *words)
    assert said.code == errors.UsageError.exit_code
    assert "Traceback" not in said.err
