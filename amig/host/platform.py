"""The ports of a PC that a guest kernel expects, beside what KVM has in the kernel (PIC, PIT, APICs)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Annotated

import msgspec

from amig.host import acpi, guest_abi, serial
from amig.host.exits import GuestStop, PortBus, WaitPort, ones

log = logging.getLogger(__name__)

KEYBOARD_COMMAND_PORT = 0x64
_KEYBOARD_RESET = 0xFE
_CF9_RESET = 0x04
_SLEEP_ENABLE = 1 << 13
_SCI_ENABLE = 1

Word = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]


class PowerState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The registers of `PowerManagement`."""

    enable: Word = 0
    control: Word = _SCI_ENABLE


class SerialPorts:
    """A serial port's eight registers on the port bus; a wider access is one for each byte, as on the ISA bus."""

    def __init__(self, port: serial.Serial16550) -> None:
        self._port = port

    def read(self, offset: int, size: int) -> int:
        """Read ``size`` registers from ``offset`` on."""
        return sum(self._port.read((offset + i) & 7) << 8 * i for i in range(size))

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` registers from ``offset`` on."""
        for i, byte in enumerate(value.to_bytes(size, "little")):
            self._port.write((offset + i) & 7, bytes([byte]))


class KeyboardController:
    """The one thing that is left of the keyboard controller: command 0xfe resets the machine."""

    def read(self, offset: int, size: int) -> int:
        """Nothing typed, ready for a command: a reboot waits for that."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Stop the guest when it asks for a reset."""
        if value & 0xFF == _KEYBOARD_RESET:
            raise GuestStop("the guest asked for a reset (keyboard controller)")


class ResetControl:
    """Port 0xcf9."""

    def read(self, offset: int, size: int) -> int:
        """Zero: no reset is under way."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Stop the guest when it asks for a reset."""
        if value & _CF9_RESET:
            raise GuestStop("the guest asked for a reset (port 0xcf9)")


class PowerManagement:
    """ACPI's fixed registers: an event block in which nothing ever happens, and the control register.

    Source: ACPI specification 5.0, 4.8.3. Sleep type 5 switches off.
    """

    _STATUS, _ENABLE, _CONTROL = 0, 2, acpi.PM1_CONTROL_PORT - acpi.PM1_EVENT_PORT
    PORTS = _CONTROL + 2

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._enable = 0
        self._control = _SCI_ENABLE

    def read(self, offset: int, size: int) -> int:
        """Read a register, or both of the event block."""
        with self._lock:
            block = bytes(2) + self._enable.to_bytes(2, "little") + self._control.to_bytes(2, "little")
        return int.from_bytes(block[offset : offset + size].ljust(size, b"\xff"), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; switching off stops the guest."""
        with self._lock:
            if offset == self._CONTROL and size == 2:
                if value & _SLEEP_ENABLE:
                    kind = value >> 10 & 7
                    if kind == acpi.SLEEP_TYPE_OFF:
                        raise GuestStop("the guest switched itself off")
                    log.warning("the guest asked for sleep state %d, which does not exist here", kind)
                self._control = value & ~_SLEEP_ENABLE & 0xFFFF | _SCI_ENABLE
            elif offset == self._ENABLE and size == 2:
                self._enable = value & 0xFFFF
            elif offset == self._STATUS and size == 4:
                self._enable = value >> 16 & 0xFFFF

    def save(self) -> PowerState:
        """Return all state."""
        with self._lock:
            return PowerState(enable=self._enable, control=self._control)

    def load(self, state: PowerState) -> None:
        """Take ``state`` over."""
        with self._lock:
            self._enable, self._control = state.enable, state.control


class ExitPort:
    """The port on which amig's own guest image says that its workload has ended, and how; the guest goes on idle."""

    def __init__(self, on_end: Callable[[int], None]) -> None:
        self._on_end = on_end

    def read(self, offset: int, size: int) -> int:
        """Ones, like a port that isn't there."""
        return ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Tell the host."""
        if offset == 0:
            self._on_end(value)


def wire(
    bus: PortBus,
    *,
    com1: serial.Serial16550,
    power: PowerManagement,
    on_workload_end: Callable[[int], None],
    wait_port: bool,
) -> None:
    """Put every device on the bus. All other ports (PCI configuration, CMOS, ...) read as ones."""
    bus.add(serial.COM1_BASE, serial.PORTS, SerialPorts(com1))
    bus.add(KEYBOARD_COMMAND_PORT, 1, KeyboardController())
    bus.add(acpi.RESET_PORT, 1, ResetControl())
    bus.add(acpi.PM1_EVENT_PORT, PowerManagement.PORTS, power)
    bus.add(guest_abi.PORT_EXIT, 4, ExitPort(on_workload_end))
    if wait_port:
        WaitPort().add_to(bus)
