"""The ports of the little PC around the guest."""

import msgspec
import pytest

from amig.host import acpi, guest_abi, platform
from amig.host.exits import GuestStop, PortBus
from amig.host.platform import PowerManagement, PowerState
from amig.host.serial import COM1_BASE, Serial16550


class Pc:
    def __init__(self):
        self.bus, self.power, self.out, self.verdicts = PortBus(), PowerManagement(), bytearray(), []
        com1 = Serial16550(irq=lambda level: None, sink=self.out.extend)
        platform.wire(self.bus, com1=com1, power=self.power, on_workload_end=self.verdicts.append, wait_port=True)


@pytest.fixture
def pc():
    return Pc()


def test_the_serial_port_takes_wide_accesses_byte_by_byte(pc):
    pc.bus.write(COM1_BASE, 1, 0x41)
    assert pc.out == b"A"
    pc.bus.write(COM1_BASE + 3, 1, 0x80)
    pc.bus.write(COM1_BASE, 2, 0x1234)
    assert pc.bus.read(COM1_BASE, 1) == 0x34
    assert pc.bus.read(COM1_BASE, 2) == 0x1234
    assert pc.bus.read(COM1_BASE + 3, 1) == 0x80


@pytest.mark.parametrize(
    ("port", "size", "value", "why"),
    [
        (0x64, 1, 0xFE, "reset"),
        (0xCF9, 1, 0x06, "reset"),
        (acpi.PM1_CONTROL_PORT, 2, 1 << 13 | acpi.SLEEP_TYPE_OFF << 10, "switched itself off"),
    ],
)
def test_the_ways_to_stop(pc, port, size, value, why):
    with pytest.raises(GuestStop, match=why):
        pc.bus.write(port, size, value)


def test_what_looks_alike_does_not_stop(pc):
    pc.bus.write(0x64, 1, 0xAA)
    pc.bus.write(0xCF9, 1, 0x02)
    pc.bus.write(0xCF8, 4, 0x8000_0000)
    pc.bus.write(acpi.PM1_CONTROL_PORT, 2, acpi.SLEEP_TYPE_OFF << 10)
    pc.bus.write(acpi.PM1_CONTROL_PORT, 2, 1 << 13 | 1 << 10)


def test_what_is_not_there_reads_as_ones(pc):
    assert pc.bus.read(0xCF8, 4) == 0xFFFF_FFFF, "no PCI"
    assert pc.bus.read(0x71, 1) == 0xFF, "no CMOS clock"
    assert pc.bus.read(0x64, 1) == 0, "the keyboard controller is ready for a reset command"


def test_acpi_registers_hold_what_is_written(pc):
    assert pc.bus.read(acpi.PM1_CONTROL_PORT, 2) == 1, "ACPI mode is on"
    pc.bus.write(acpi.PM1_EVENT_PORT + 2, 2, 0x0120)
    pc.bus.write(acpi.PM1_EVENT_PORT, 2, 0xFFFF)
    assert pc.bus.read(acpi.PM1_EVENT_PORT, 4) == 0x0120_0000
    pc.bus.write(acpi.PM1_CONTROL_PORT, 2, 0x0402)
    assert pc.bus.read(acpi.PM1_CONTROL_PORT, 2) == 0x0403
    other = PowerManagement()
    other.load(msgspec.msgpack.decode(msgspec.msgpack.encode(pc.power.save()), type=PowerState))
    assert other.read(2, 2) == 0x0120
    assert other.read(4, 2) == 0x0403


def test_the_guest_image_tells_its_verdict_and_finds_the_wait_port(pc):
    pc.bus.write(guest_abi.PORT_EXIT, 4, 1)
    assert pc.verdicts == [1]
    assert pc.bus.read(guest_abi.PORT_PROBE, 4) == guest_abi.PROBE_MAGIC
    assert pc.bus.read(guest_abi.PORT_EXIT, 4) == 0xFFFF_FFFF
