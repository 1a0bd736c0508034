"""The few ACPI tables that let a stock kernel find its processors, power off, and keep its hands off what isn't there.

Source: ACPI specification 5.0, chapters 5 and 20. The fixed hardware is two registers (`amig.host.platform`).
"""

from __future__ import annotations

import struct

from amig.host import layout

PM1_EVENT_PORT = 0x600
"""Status and enable register, two bytes each."""
PM1_CONTROL_PORT = 0x604
RESET_PORT = 0xCF9
RESET_VALUE = 0x06
SLEEP_TYPE_OFF = 5
"""What the guest writes as sleep type to power off (the S5 package of the DSDT says so)."""
SCI_IRQ = 9

_LEGACY_DEVICES, _NO_VGA, _NO_CMOS_RTC = 1, 1 << 2, 1 << 5
_WBINVD, _PROC_C1, _NO_POWER_BUTTON, _NO_SLEEP_BUTTON, _NO_FIXED_RTC, _RESET_REGISTER, _HEADLESS = (
    1 << bit for bit in (0, 2, 4, 5, 6, 10, 12)
)
_GAS_IO = 1


def rsdp_address() -> int:
    """Where `tables` begins: with the root pointer, as loaders tell their kernels."""
    return layout.ACPI_START


def tables(vcpus: int) -> bytes:
    """Return all tables, to be put at `rsdp_address`, for APIC ids 0 to ``vcpus`` - 1."""
    body = bytearray(64)  # the root pointer comes last: it has the address of all the rest
    base = layout.ACPI_START

    def add(table: bytes) -> int:
        body.extend(bytes(-len(body) % 64))
        body.extend(table)
        return base + len(body) - len(table)

    facs = add(struct.pack("<4sI56x", b"FACS", 64))
    dsdt = add(_table(b"DSDT", 2, _AML))
    fadt = add(_table(b"FACP", 5, _fadt(facs, dsdt)))
    madt = add(_table(b"APIC", 3, _madt(vcpus)))
    xsdt = add(_table(b"XSDT", 1, struct.pack("<QQ", fadt, madt)))
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"AMIG  ", 2, 0, 36, xsdt, 0))
    rsdp[8] = -sum(rsdp[:20]) & 0xFF
    rsdp[32] = -sum(rsdp) & 0xFF
    body[: len(rsdp)] = rsdp
    return bytes(body)


# Name (_S5, Package (4) { 5, 5, 0, 0 })
_AML = b"\x08_S5_\x12\x08\x04" + bytes([0x0A, SLEEP_TYPE_OFF, 0x0A, SLEEP_TYPE_OFF, 0, 0])


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    table = bytearray(
        struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, b"AMIG  ", b"AMIGHOST", 1, b"AMIG", 1)
        + body
    )
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def _gas(port: int, size: int) -> bytes:
    """A generic address structure of ``size`` bytes of I/O ports; none when ``size`` is 0."""
    if not size:
        return bytes(12)
    return struct.pack("<BBBBQ", _GAS_IO, size * 8, 0, 0, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    flags = _WBINVD | _PROC_C1 | _NO_POWER_BUTTON | _NO_SLEEP_BUTTON | _NO_FIXED_RTC | _RESET_REGISTER | _HEADLESS
    fields = (
        struct.pack("<IIBBHIBBBB", facs, dsdt, 0, 0, SCI_IRQ, 0, 0, 0, 0, 0),
        struct.pack("<8I", PM1_EVENT_PORT, 0, PM1_CONTROL_PORT, 0, 0, 0, 0, 0),
        struct.pack("<8B", 4, 2, 0, 0, 0, 0, 0, 0),
        struct.pack("<HHHH5B", 0xFFFF, 0xFFFF, 0, 0, 0, 0, 0, 0, 0),  # latencies: no C2, no C3
        struct.pack("<HBI", _LEGACY_DEVICES | _NO_VGA | _NO_CMOS_RTC, 0, flags),
        _gas(RESET_PORT, 1),
        struct.pack("<BHBQQ", RESET_VALUE, 0, 0, 0, dsdt),
        *(_gas(port, size) for port, size in ((PM1_EVENT_PORT, 4), (0, 0), (PM1_CONTROL_PORT, 2), (0, 0))),
        bytes(12 * 6),  # PM2, timer, two GPE blocks, sleep control and status: none
    )
    return b"".join(fields)


def _madt(vcpus: int) -> bytes:
    entries = [struct.pack("<BBBBI", 0, 8, i, i, 1) for i in range(vcpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, vcpus, 0, layout.IOAPIC_ADDRESS, 0))
    # The system control interrupt is level-triggered, active high. All other ISA interrupts are where KVM puts them,
    # pin for pin, the timer's at 0.
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, SCI_IRQ, SCI_IRQ, 0xD))
    return struct.pack("<II", layout.LAPIC_ADDRESS, 1) + b"".join(entries)
