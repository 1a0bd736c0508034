"""The observer of the bench beside QEMU: what it makes of looks, and what it reads of processes."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import pytest

from amig.host import guest_abi as abi
from tests.bench import lowmem, processes
from tests.bench.watch import Beat, GuestClock

MIB = 1 << 20
MS = 1_000_000


# ---- what the observer makes of looks ----


def looks(beat: Beat, until: int, stop: int, step: int, *, lag: int = 0, ticks: int = 1) -> None:
    """Look every ``step`` at a guest that beats every 0.1 ms until ``stop``; its pages arrive ``lag`` beats late."""
    for now in range(step, until, step):
        count = min(now, stop) // (MS // 10)
        assert not beat.look(now, max(0, count - lag), count, count * (MS // 10) * ticks)


def test_the_last_beat_is_known_better_than_the_looks_are_apart() -> None:
    beat = Beat(GuestClock(khz=1e6))  # a tick is a nanosecond
    looks(beat, 20 * MS, 10 * MS + 340_000, MS)
    count = 103  # at 10.3 ms; seen at 11 ms
    assert beat.look(20 * MS + 20_000, count + 1, count, count * (MS // 10))
    assert beat.downtime == 20 * MS + 20_000 - 10_300_000
    assert beat.uncertain == MS + 20_000
    assert beat.silent(20 * MS)


def test_beats_that_arrive_as_pages_are_no_landing() -> None:
    beat = Beat(GuestClock(khz=1e6))
    looks(beat, 30 * MS, 25 * MS, MS, lag=3)
    looks(beat, 30 * MS, 25 * MS, MS, lag=0)
    assert beat.downtime is None


def test_a_stamp_that_makes_no_sense_is_not_believed() -> None:
    beat = Beat(GuestClock(khz=1e6))
    looks(beat, 12 * MS, 10 * MS, MS, ticks=0)  # the guest's clock stands still
    assert beat.look(15 * MS, 101, 100, 0)
    assert beat.downtime is not None
    assert 15 * MS - 10 * MS <= beat.downtime <= 15 * MS - 9 * MS, "within the two looks around it"


def test_the_longest_silence_before_is_told_apart() -> None:
    beat = Beat(GuestClock(khz=1e6))
    for now, count in ((MS, 1), (2 * MS, 2), (9 * MS, 3), (10 * MS, 4)):
        beat.look(now, 0, count, count)
    assert beat.stalled == 7 * MS


def test_a_guest_that_knows_its_frequency_badly_is_set_right() -> None:
    clock = GuestClock(khz=2e6 * 1.01)  # it is 2 GHz
    for now in (100_000, 200_000):
        clock.seen(now + 5_000, 2 * now)
    clock.seen(300_000, 600_000)
    clock.settle()
    for now in range(10**9, 10**9 + 70 * 1000, 1000):
        clock.seen(now, 2 * now)
    clock.settle()
    assert clock.at(2 * (10**9 + 50_000_000)) == pytest.approx(10**9 + 50_000_000, abs=10)


# ---- processes ----


HOST = """
import mmap, os, sys
guest, buffers = os.memfd_create("amig-guest-0"), os.memfd_create("buffers")
os.ftruncate(guest, int(sys.argv[1]))
os.ftruncate(buffers, 1 << 16)
with mmap.mmap(guest, int(sys.argv[1])) as memory, mmap.mmap(buffers, 1 << 16) as more:
    memory[int(sys.argv[2])] = 7
    more[:] = bytes([1]) * len(more)
    print(flush=True)
    sys.stdin.read()
"""


def test_the_memory_of_a_guest_is_found_by_its_process_alone() -> None:
    # In processes of their own: in this one, guests of other tests may still wait to be collected.
    idle = [sys.executable, "-c", "import sys\nprint(flush=True)\nsys.stdin.read()"]
    host = [sys.executable, "-c", HOST, str(abi.SHARED_END), str(abi.CPU_GPA)]
    with ExitStack() as stack:
        none, one = (
            stack.enter_context(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            for words in (idle, host)
        )
        for child in (none, one):
            assert child.stdout is not None
            assert child.stdout.readline() == b"\n"
        assert lowmem.LowMemory.of(none.pid) is None
        assert lowmem.populated(none.pid) == 0
        assert lowmem.held(none.pid) == {}
        assert lowmem.populated(one.pid) == 4096, "the page that was written, before others are read"
        low = lowmem.LowMemory.of(one.pid)
        assert low is not None
        assert low.words[lowmem.HEARTBEAT] == 7
        assert not low.running()
        assert sum(lowmem.held(one.pid).values()) == 1 << 16, "the buffers, and not the guest's memory"
    assert lowmem.LowMemory.of(one.pid) is None, "it has gone"
    assert low.words[lowmem.HEARTBEAT] == 7, "what was mapped outlives it"


def test_processes_are_measured_from_outside() -> None:
    words = (
        "import sys,time\nm=bytearray(64<<20)\nwhile time.process_time()<0.2: pass\nprint(flush=True)\nsys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert processes.cpu_s(child.pid) >= 0.2
        assert processes.private_bytes(child.pid) >= 64 * MIB
        assert processes.busiest({}, processes.thread_cpu_s(child.pid)) == child.pid
    finally:
        child.kill()
        child.communicate()
    assert processes.cpu_s(child.pid) == 0.0
    assert processes.private_bytes(child.pid) == 0
