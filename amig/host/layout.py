"""Where things lie in a guest's physical address space.

::

    0x0000_0000   RAM; boot data (start info, page tables, command line) in the first 512 KiB
    0x0009_fc00   reserved (the BIOS data area of old)
    0x000a_0000   not RAM (VGA of old)
    0x000e_0000   reserved: ACPI tables
    0x0010_0000   RAM: kernel images
    0xc000_0000   the hole: APICs, KVM's TSS and identity map; nothing else lives there
    0x1_0000_0000 the rest of RAM
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from amig.errors import UsageError
from amig.memory import MAX_REGION_BYTES, PAGE_SIZE, MemoryMap, Region, Slot

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

HOLE_START = 3 * GIB
HOLE_END = 4 * GIB

IOAPIC_ADDRESS = 0xFEC0_0000
LAPIC_ADDRESS = 0xFEE0_0000
IDENTITY_MAP_ADDRESS = 0xFFFB_C000
"""One page that KVM needs on Intel hosts without unrestricted guest; where QEMU puts it."""
TSS_ADDRESS = 0xFFFB_D000
"""Three pages, for the same reason."""

BOOT_DATA_START = 0x1000
BOOT_DATA_END = 512 * KIB
LOW_RAM_END = 0x9_FC00
ACPI_START = 0xE_0000
HIGH_RAM_START = MIB


class RangeType(enum.IntEnum):
    """Types of the BIOS memory map (e820), the same numbers in PVH's memory map."""

    RAM = 1
    RESERVED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysRange:
    """One line of the memory map that a guest kernel is told."""

    start: int
    size: int
    type: RangeType


def memory_map(size: int) -> MemoryMap:
    """Lay ``size`` bytes of RAM out below and above the hole, all in region 0; generation 0.

    Raises `UsageError` for a size that isn't a positive multiple of the page size.
    """
    if not 0 < size <= MAX_REGION_BYTES or size % PAGE_SIZE:
        raise UsageError(
            f"guest memory of {size} bytes: it must be a multiple of {PAGE_SIZE}, at most {MAX_REGION_BYTES}"
        )
    low = min(size, HOLE_START)
    slots = [Slot(index=0, guest_phys=0, size=low, region=0, offset=0)]
    if size > low:
        slots.append(Slot(index=1, guest_phys=HOLE_END, size=size - low, region=0, offset=low))
    return MemoryMap(generation=0, regions=(Region(id=0, size=size),), slots=tuple(slots))


def physical_ranges(memory: MemoryMap) -> list[PhysRange]:
    """Return the memory map to tell a guest's kernel: RAM from the slots, less what is reserved in the first MiB.

    Raises `UsageError` when there is no RAM at 0 reaching past the first MiB.
    """
    slots = sorted(memory.slots, key=lambda s: s.guest_phys)
    if not slots or slots[0].guest_phys != 0 or slots[0].size <= HIGH_RAM_START:
        raise UsageError("the guest has no RAM from address 0 past the first MiB: nothing can be booted in it")
    ranges = [
        PhysRange(start=0, size=LOW_RAM_END, type=RangeType.RAM),
        PhysRange(start=LOW_RAM_END, size=0xA_0000 - LOW_RAM_END, type=RangeType.RESERVED),
        PhysRange(start=ACPI_START, size=HIGH_RAM_START - ACPI_START, type=RangeType.RESERVED),
        PhysRange(start=HIGH_RAM_START, size=slots[0].size - HIGH_RAM_START, type=RangeType.RAM),
    ]
    ranges += [PhysRange(start=s.guest_phys, size=s.size, type=RangeType.RAM) for s in slots[1:]]
    return ranges
