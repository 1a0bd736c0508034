"""The port and memory-mapped buses, and the wait port."""

from __future__ import annotations

import logging
import signal
import threading
import time

import pytest

from amig.errors import UsageError
from amig.host.exits import KICK_SIGNAL, MmioBus, PortBus, WaitPort
from amig.host.guest_abi import PORT_PROBE, PORT_WAIT, PROBE_MAGIC


class Recorder:
    """A device that notes what it is told and answers with ``answer``."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.seen: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("read", offset, size, 0))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", offset, size, value))


def test_ports_go_to_their_device_with_an_offset() -> None:
    bus, device, other = PortBus(), Recorder(0x1FF), Recorder(7)
    bus.add(0x3F8, 8, device)
    bus.add(0x400, 1, other)
    bus.write(0x3FD, 1, 0x41)
    assert bus.read(0x3FF, 1) == 0xFF  # cut to the size asked for
    assert bus.read(0x3F8, 2) == 0x1FF
    assert bus.read(0x400, 4) == 7
    assert device.seen == [("write", 5, 1, 0x41), ("read", 7, 1, 0), ("read", 0, 2, 0)]


def test_unknown_ports_read_as_ones_and_swallow_writes() -> None:
    bus = PortBus()
    assert [bus.read(0xCFC, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    bus.write(0xCF8, 4, 1)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0xFFFF, 2), (5, 0), (0x3FF, 1), (0x3F0, 9)])
def test_ports_outside_or_taken_are_refused(first: int, count: int) -> None:
    bus = PortBus()
    bus.add(0x3F8, 8, Recorder())
    with pytest.raises(UsageError):
        bus.add(first, count, Recorder())
    assert bus.read(0x3F0, 1) == 0xFF  # nothing of a refused range stays


def test_memory_mapped_accesses_go_to_their_device_with_an_offset() -> None:
    bus, low, high = MmioBus(), Recorder(1 << 70 | 5), Recorder(6)
    bus.add(0xE000_0000, 0x1000, high)
    bus.add(0xD000_0000, 0x1000, low)
    bus.write(0xE000_0FF8, 8, 1 << 63)
    assert bus.read(0xD000_0004, 8) == 5
    assert bus.read(0xE000_0000, 4) == 6
    assert high.seen == [("write", 0xFF8, 8, 1 << 63), ("read", 0, 4, 0)]


@pytest.mark.parametrize(
    ("first", "size"), [(0x1FFF, 1), (0x0, 0x1001), (0x1800, 4), (0x0, 0x10000), (-1, 1), (0, 0), ((1 << 64) - 1, 2)]
)
def test_overlapping_or_impossible_ranges_are_refused(first: int, size: int) -> None:
    bus = MmioBus()
    bus.add(0x1000, 0x1000, Recorder())
    with pytest.raises(UsageError):
        bus.add(first, size, Recorder())
    bus.add(0x2000, 1, Recorder())
    bus.add(0xFFF, 1, Recorder())


def test_unknown_addresses_read_as_ones_and_are_logged_once_a_page(caplog: pytest.LogCaptureFixture) -> None:
    bus = MmioBus()
    bus.add(0x1000, 0x1000, Recorder())
    with caplog.at_level(logging.WARNING):
        assert bus.read(0xFEC0_0000, 4) == 0xFFFF_FFFF
        assert bus.read(0xFEC0_0010, 8) == (1 << 64) - 1
        bus.write(0xFEC0_0020, 4, 1)
        assert bus.read(0x2000, 1) == 0xFF
        assert bus.read(0xFFF, 1) == 0xFF
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "guest read of 4 bytes at 0xfec00000",
        "guest read of 1 bytes at 0x2000",
        "guest read of 1 bytes at 0xfff",
    ]


def test_a_guest_that_scans_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    bus = MmioBus()
    for page in range(1000):
        bus.read(page << 12, 4)
    assert len(caplog.records) == MmioBus.MOST_LOGGED


def test_the_wait_port_answers_the_probe() -> None:
    bus = PortBus()
    WaitPort().add_to(bus)
    assert bus.read(PORT_PROBE, 4) == PROBE_MAGIC
    assert bus.read(PORT_WAIT, 4) == 0xFFFF_FFFF
    bus.write(PORT_PROBE, 4, 5)  # no wait, no error


def test_the_wait_port_waits_about_as_long_as_asked_and_never_for_ever() -> None:
    port = WaitPort()
    for asked, least in ((0, 0.0), (2000, 0.002), (0xFFFF_FFFF, 0.1)):
        start = time.monotonic()
        port.write(0, 4, asked)
        assert time.monotonic() - start >= least


def test_a_kick_ends_a_wait() -> None:
    ready, port, waits = threading.Event(), WaitPort(), 0
    kicked = threading.Event()

    def body() -> None:
        nonlocal waits
        signal.pthread_sigmask(signal.SIG_BLOCK, (KICK_SIGNAL,))
        ready.set()
        kicked.wait(30)
        for _ in range(50):  # together five seconds, if no kick ended one
            port.write(0, 4, 100_000)
            waits += 1
            if signal.sigtimedwait((KICK_SIGNAL,), 0) is not None:
                return

    thread = threading.Thread(target=body)
    thread.start()
    ready.wait(30)
    assert thread.ident is not None
    signal.pthread_kill(thread.ident, KICK_SIGNAL)
    kicked.set()
    while waits == 0:
        pass
    for _ in range(5):
        signal.pthread_kill(thread.ident, KICK_SIGNAL)
    thread.join(30)
    assert waits < 10
