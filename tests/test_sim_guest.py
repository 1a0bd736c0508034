"""A simulated machine looks like a real one from outside, moves like one, and notices lost memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from amig import bitmap
from amig.dirty.hub import DirtyLogHub
from amig.dirty.log import LogAbilities
from amig.errors import GuestError, UsageError, VerifyFailed
from amig.host import guest_abi as abi
from amig.host.guest_abi import Bad, Fill, State, Work, Write
from amig.host.machine import Machine
from amig.host.memory import MemfdMemory
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot
from amig.sim import content
from amig.sim.guest import SimMachine
from amig.sim.kernel_log import MODERN
from amig.sim.options import SimOptions

SIZE = 4 << 20
CHECK = "workload=check ws=1MiB rate=40MB/s tick_us=200 fill=mixed"

Make = Callable[..., SimMachine]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def build(cmdline: str = CHECK, *, vcpus: int = 1, size: int = SIZE, **more: object) -> SimMachine:
            memory = MemfdMemory.create(size)
            machine = SimMachine(memory, SimOptions.parse(cmdline, vcpus=vcpus), **more)  # type: ignore[arg-type]
            stack.callback(machine.close)
            return machine

        yield build


def raw(machine: Machine) -> np.ndarray:
    return machine.memory.pages(0).reshape(-1)


def cpus(machine: SimMachine) -> np.ndarray:
    return abi.parse_cpus(raw(machine), machine.vcpus)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread brings about; the suite's time limit ends what never comes."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.001)


def run(machine: SimMachine) -> SimMachine:
    machine.resume()
    until(lambda: abi.present(raw(machine)) and int(abi.parse_status(raw(machine))["state"]) == State.RUNNING)
    return machine


def advance(machine: SimMachine, writes: int = 300) -> None:
    """Let every vCPU write."""
    before = cpus(machine)["writes"].copy()
    until(lambda: bool((cpus(machine)["writes"] >= before + writes).all()))


def ask_to_verify(machine: SimMachine, number: int) -> int:
    """Ask the guest to verify its memory, as a host does; returns the mismatches that it found."""
    machine.memory.write(abi.CONTROL_GPA + 8, number.to_bytes(8, "little"))
    until(lambda: bool((cpus(machine)["verify_done"] == number).all()))
    return int(cpus(machine)["verify_mismatches"].sum())


def like(machine: SimMachine) -> SimMachine:
    return SimMachine.build_like(machine.describe(), machine.memory.map)


# Observed from outside.


@pytest.mark.parametrize("vcpus", [1, 3])
def test_the_status_page_and_the_vcpu_blocks_are_those_of_the_guest_image(make: Make, vcpus: int) -> None:
    machine = run(make(vcpus=vcpus))
    status = abi.parse_status(raw(machine))
    assert (int(status["vcpus"]), int(status["workload"]), int(status["ws_pages"])) == (vcpus, Work.CHECK, 256)
    assert int(status["rate_pages"]) == 40_000_000 // PAGE_SIZE
    assert int(status["cpus_ready"]) == vcpus
    assert sum(pages for _gpa, pages in abi.ws_ranges(status)) == 256
    assert b"check" in bytes(status["cmdline"])
    advance(machine)
    blocks = cpus(machine)
    assert (blocks["state"] == State.RUNNING).all()
    assert (blocks["heartbeat"] > 0).all()
    assert (blocks["verified"] > 0).all()
    assert blocks["pages"].sum() == 256
    assert blocks["filled"].sum() == 256
    assert blocks["mismatches"].sum() == 0
    before = cpus(machine)["heartbeat"].copy()
    until(lambda: bool((cpus(machine)["heartbeat"] > before).all()))


def test_passes_come_round(make: Make) -> None:
    machine = run(make("workload=check ws=256KiB tick_us=200"))
    until(lambda: int(cpus(machine)["passes"][0]) >= 2)
    assert machine.verify() == 0


def test_a_verification_is_answered_by_every_vcpu(make: Make) -> None:
    machine = run(make(vcpus=2))
    assert ask_to_verify(machine, 7) == 0
    assert cpus(machine)["verify_pages"].sum() == 256
    assert ask_to_verify(machine, 8) == 0


def test_quiesce_stops_the_writes(make: Make) -> None:
    machine = run(make())
    machine.memory.write(abi.CONTROL_GPA + 16, (5).to_bytes(8, "little"))
    until(lambda: int(cpus(machine)["quiesced"][0]) == 5)
    writes, beats = int(cpus(machine)["writes"][0]), int(cpus(machine)["heartbeat"][0])
    until(lambda: int(cpus(machine)["heartbeat"][0]) > beats + 3)
    assert int(cpus(machine)["writes"][0]) == writes
    machine.memory.write(abi.CONTROL_GPA + 16, bytes(8))
    advance(machine, 10)
    assert int(cpus(machine)["quiesced"][0]) == 0


def test_the_largest_gap_between_heartbeats_is_measured(make: Make) -> None:
    machine = run(make())
    machine.memory.write(abi.CONTROL_GPA, (1).to_bytes(8, "little"))
    until(lambda: int(cpus(machine)["gap_ack"][0]) == 1)
    machine.pause()
    threading.Event().wait(0.3)
    machine.resume()
    until(lambda: int(cpus(machine)["gap_max"][0]) >= 300_000_000)


@pytest.mark.parametrize(
    "cmdline",
    [
        "workload=random ws=1MiB",
        "workload=sequential ws=1MiB write=page fill=text",
        "workload=hotspot ws=1MiB hot=90:10 rate=400MB/s",
        "workload=hotspot ws=1MiB hot=50:100 write=page",
    ],
)
def test_other_workloads_write_their_working_set(make: Make, cmdline: str) -> None:
    machine = make(cmdline, vcpus=2)
    machine.resume()
    until(lambda: bool((cpus(machine)["writes"] > 1000).all()))
    machine.pause()
    ws = abi.ws_ranges(abi.parse_status(raw(machine)))
    written = np.asarray(raw(machine).reshape(-1, PAGE_SIZE).any(axis=1))
    ((gpa, pages),) = ws
    inside: np.ndarray = written[gpa // PAGE_SIZE : gpa // PAGE_SIZE + pages]
    assert inside.mean() > 0.2
    assert not written[gpa // PAGE_SIZE + pages :].any()


def test_hotspot_is_hot(make: Make) -> None:
    machine = run(make("workload=hotspot ws=1MiB hot=90:10"))
    hub = DirtyLogHub(machine.log, machine.memory.map)
    user = hub.open("meter")
    user.take_and_clear(0, 0, SIZE // PAGE_SIZE, 0)
    ((gpa, _pages),) = abi.ws_ranges(abi.parse_status(raw(machine)))
    hot = np.zeros(2)
    for _ in range(20):
        before = int(cpus(machine)["writes"][0])
        until(lambda: int(cpus(machine)["writes"][0]) > before + 32)  # noqa: B023
        user.sync()
        pages = bitmap.to_pages(user.take_and_clear(0, 0, SIZE // PAGE_SIZE, 0)) - gpa // PAGE_SIZE
        hot += ((pages >= 0) & (pages < 25)).sum() / 25, ((pages >= 25) & (pages < 256)).sum() / 231
    assert hot[0] > 2 * hot[1]


@pytest.mark.parametrize(("fill", "zero"), [("zero", True), ("const", False), ("random", False), ("mixed", False)])
def test_memory_is_filled_first(make: Make, fill: str, zero: bool) -> None:
    machine = run(make(f"workload=fill fill={fill} ws=64KiB fill_size=1MiB", vcpus=2))
    ((gpa, pages),) = abi.ws_ranges(abi.parse_status(raw(machine)))
    assert pages == 16
    assert cpus(machine)["filled"].sum() == 256
    memory = raw(machine).reshape(-1, PAGE_SIZE)[gpa // PAGE_SIZE :]
    assert memory[:256].any(axis=1).all() == (not zero)
    assert not memory[256:].any()


def test_an_idle_guest_beats_and_nothing_else(make: Make) -> None:
    machine = run(make("workload=idle"))
    before = int(cpus(machine)["heartbeat"][0])
    until(lambda: int(cpus(machine)["heartbeat"][0]) > before + 3)
    assert int(cpus(machine)["writes"][0]) == 0
    assert ask_to_verify(machine, 3) == 0


def test_the_console_talks_and_echoes(make: Make) -> None:
    said: list[bytes] = []
    machine = make(serial=said.append)
    run(machine)
    machine.serial_input(b"hello")
    assert said[0].endswith(b"ready workload=check\r\n")
    assert b"hello" in said
    ask_to_verify(machine, 4)
    until(lambda: any(b"verify 4" in line and b"ok" in line for line in said))


# Dirty marks.


@pytest.mark.parametrize("abilities", [MODERN, LogAbilities(manual_clear=False, initially_set=False)])
def test_every_write_is_in_the_log(make: Make, abilities: LogAbilities) -> None:
    """Copies that follow the log, and only the log, end up equal to memory."""
    machine = run(make(vcpus=2, abilities=abilities))
    hub = DirtyLogHub(machine.log, machine.memory.map)
    user = hub.open("copy")
    copy = np.zeros((SIZE // PAGE_SIZE, PAGE_SIZE), np.uint8)
    for round_ in range(6):
        if round_ == 5:
            machine.pause()
        else:
            advance(machine, 50)
        user.sync()
        for first in range(0, len(copy), 128):
            pages = bitmap.to_pages(user.take_and_clear(0, first, 128, 0), first)
            copy[pages] = machine.memory.pages(0)[pages]
    assert np.array_equal(copy, machine.memory.pages(0))


# Paused, saved, moved.


def test_a_paused_machine_writes_nothing(make: Make) -> None:
    machine = make(vcpus=2)
    machine.pause()
    run(machine)
    machine.pause()
    machine.pause()
    before = raw(machine).copy()
    threading.Event().wait(0.05)
    assert np.array_equal(raw(machine), before)
    machine.resume()
    machine.resume()
    advance(machine, 10)


def test_a_machine_moves_with_memory_and_state(make: Make) -> None:
    source = run(make(vcpus=2))
    advance(source)
    source.pause()
    state = source.save()
    destination = like(source)
    try:
        raw(destination)[:] = raw(source)
        destination.load(state)
        destination.resume()
        advance(destination)
        assert ask_to_verify(destination, 9) == 0
        assert destination.verify() == 0
        assert cpus(destination)["mismatches"].sum() == 0
    finally:
        destination.close()


def test_a_running_machine_is_not_saved(make: Make) -> None:
    machine = run(make())
    with pytest.raises(GuestError, match="pause it first"):
        machine.save()


def test_the_clock_goes_on_where_it_was_saved(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 5_000

        @classmethod
        def monotonic_ns(cls) -> int:
            return cls.now

    monkeypatch.setattr("amig.sim.guest.time", Clock)
    source = make()
    Clock.now += 70
    assert source.tsc() == 70
    state = source.save()
    Clock.now += 1000
    destination = like(source)
    destination.load(state)
    assert destination.tsc() == 70
    Clock.now += 5
    assert (destination.tsc(), source.tsc()) == (75, 1075)
    destination.close()


def test_a_machine_that_never_ran_moves_and_boots_there(make: Make) -> None:
    source = make()
    state = source.save()
    destination = like(source)
    try:
        destination.load(state)
        run(destination)
        assert ask_to_verify(destination, 1) == 0
    finally:
        destination.close()


def test_a_machine_moves_while_it_fills(make: Make) -> None:
    source = make("workload=check ws=16MiB fill=random fill_size=24MiB", vcpus=2, size=32 << 20)
    source.resume()
    until(lambda: int(cpus(source)["filled"].sum()) > 100)
    source.pause()
    state = source.save()
    destination = like(source)
    try:
        raw(destination)[:] = raw(source)
        destination.load(state)
        run(destination)
        assert cpus(destination)["filled"].sum() == (24 << 20) // PAGE_SIZE
        assert ask_to_verify(destination, 1) == 0
    finally:
        destination.close()


@pytest.mark.parametrize("lost", ["page", "table", "stale", "state"])
def test_lost_memory_is_noticed(make: Make, lost: str) -> None:
    source = run(make())
    advance(source)
    source.pause()
    early = raw(source).copy()
    source.resume()
    advance(source, 600)
    source.pause()
    status = abi.parse_status(raw(source))
    ws, table = int(status["ws"][0]["gpa"]), int(status["gen_gpa"])
    after = raw(source).copy()
    changed = np.flatnonzero((early.reshape(-1, 4096) != after.reshape(-1, 4096)).any(axis=1))
    stale = int(changed[changed >= ws // PAGE_SIZE][0])

    state = source.save()
    destination = like(source)
    try:
        memory = raw(destination)
        memory[:] = raw(source)
        match lost:
            case "page":
                memory[ws : ws + PAGE_SIZE] = 0
            case "table":
                memory[table : table + PAGE_SIZE] = early[table : table + PAGE_SIZE]
            case "stale":
                where = slice(stale * PAGE_SIZE, (stale + 1) * PAGE_SIZE)
                memory[where] = early[where]
            case _:  # the page that saving had written
                memory[abi.CPU_GPA : abi.CPU_GPA + PAGE_SIZE] = after[abi.CPU_GPA : abi.CPU_GPA + PAGE_SIZE]
        destination.load(state)
        if lost != "state":
            assert destination.verify() > 0
        destination.resume()
        if lost == "state":
            until(lambda: int(cpus(destination)["mismatches"][0]) == 1)
            return
        until(lambda: int(cpus(destination)["mismatches"][0]) > 0)
        kinds = {"page": Bad.ZERO, "table": Bad.NEWER, "stale": Bad.STALE}
        assert int(cpus(destination)["mismatch"][0, 0]["kind"]) == kinds[lost]
        assert "expected generation" in next(abi.mismatches(cpus(destination)))
    finally:
        destination.close()


def test_a_state_must_fit(make: Make) -> None:
    source = run(make())
    source.pause()
    state = source.save()
    other = make("workload=check ws=64KiB", vcpus=1)
    two = make(vcpus=2)
    for machine, wrong in ((other, state), (two, state), (other, b""), (other, b"x" * (2 << 20)), (other, state[:-1])):
        with pytest.raises(VerifyFailed):
            machine.load(wrong)
    with pytest.raises(GuestError, match="has run"):
        source.load(state)
    for description in (b"", b"\xc0", source.describe() + b"x", b"x" * (2 << 20)):
        with pytest.raises(UsageError):
            SimMachine.build_like(description, source.memory.map)


# Ends.


def test_a_crash_is_told_once(make: Make) -> None:
    machine = make("workload=check ws=64KiB crash=shutdown tick_us=200", vcpus=2)
    told: list[Exception | None] = []
    machine.on_stopped = told.append
    machine.resume()
    until(lambda: bool(told))
    assert isinstance(told[0], GuestError)
    machine.pause()
    assert int(abi.parse_status(raw(machine))["state"]) == State.FAULT
    with pytest.raises(GuestError, match="ended"):
        machine.resume()
    with pytest.raises(GuestError, match="ended"):
        machine.save()
    machine.close()
    assert len(told) == 1


def test_close_ends_all_threads_and_can_be_repeated(make: Make) -> None:
    machine = run(make(vcpus=3))
    assert sum(thread.name.startswith("sim-vcpu") for thread in threading.enumerate()) >= 3
    machine.close()
    machine.close()
    assert not any(thread.name.startswith("sim-vcpu") for thread in threading.enumerate())


def test_memory_that_does_not_fit_is_refused(make: Make) -> None:
    for cmdline, size in (
        ("workload=idle", 64 << 10),
        ("workload=check ws=4MiB", SIZE),
        ("workload=check ws=4KiB", SIZE),
        ("workload=fill ws=4KiB fill_size=3MiB", SIZE),
    ):
        with pytest.raises(UsageError):
            make(cmdline, vcpus=2, size=size)


def test_a_guest_with_memory_above_a_hole(make: Make) -> None:
    """The working set spans two slots that lie far apart, in one region."""
    low, high = 3 << 20, 5 << 20
    layout = MemoryMap(
        generation=0,
        regions=(Region(id=0, size=low + high),),
        slots=(
            Slot(index=0, guest_phys=0, size=low, region=0, offset=0),
            Slot(index=1, guest_phys=4 << 30, size=high, region=0, offset=low),
        ),
    )
    machine = SimMachine(MemfdMemory(layout), SimOptions.parse("workload=check ws=4MiB tick_us=200", vcpus=2))
    try:
        run(machine)
        ranges = abi.ws_ranges(abi.parse_status(raw(machine)))
        assert [gpa >> 32 for gpa, _ in ranges] == [0, 1]
        assert sum(pages for _, pages in ranges) == 1024
        advance(machine)
        assert ask_to_verify(machine, 1) == 0
        machine.pause()
        gpa = ranges[1][0] - (4 << 30) + low
        raw(machine)[gpa : gpa + 8] ^= 1
        assert machine.verify() == 1
    finally:
        machine.close()


# Words and contents.


def test_options_are_the_images_words() -> None:
    options = SimOptions.parse("workload=hotspot ws=2MiB rate=900MB/s hot=80:20 write=page fill=text seed=3 quiet x=1")
    assert options == SimOptions(
        workload=Work.HOTSPOT,
        ws=2 << 20,
        rate=900_000_000,
        hot_writes=80,
        hot_pages=20,
        write=Write.PAGE,
        fill=Fill.TEXT,
        seed=3,
        cmdline=options.cmdline,
    )
    assert SimOptions.parse("workload=fill").fill is Fill.RANDOM
    assert SimOptions.parse("rate=1").rate_pages == 1


@pytest.mark.parametrize(
    "word",
    ["workload=fast", "ws=lots", "hot=10", "hot=200:10", "hot=10:0", "seed=-1", "tick_us=1", "ws_from=4G", "fill=blue"],
)
def test_options_that_make_no_sense(word: str) -> None:
    with pytest.raises(UsageError, match="simulated guest"):
        SimOptions.parse(word)


def test_what_is_wrong_with_a_page_is_named() -> None:
    def page(number: int, generation: int) -> content.U64:
        pages = content.checked(np.array([number]), np.array([generation], np.uint32), 1, Fill.MIXED)
        return pages.reshape(-1)

    torn = page(4, 7)
    torn[300:] = page(4, 6)[300:]
    far = page(4, 7)
    far[0] = 1 << 60
    for found, kind, word in (
        (np.zeros(512, np.uint64), Bad.ZERO, 0),
        (page(4, 6), Bad.STALE, 1),
        (page(4, 8), Bad.NEWER, 1),
        (page(5, 7), Bad.FOREIGN, 0),
        (torn, Bad.TORN, 300),
        (far, Bad.GARBAGE, 0),
    ):
        assert content.what_is_wrong(found, 4, 7, 1, Fill.MIXED, 10) == (kind, word)
