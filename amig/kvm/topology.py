"""A vCPU's own numbers in its CPUID: APIC id, and one package with a core for each vCPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cpuid import CpuidEntry

_HT = 1 << 28
_CMP_LEGACY = 1 << 1


def place_vcpu(entry: CpuidEntry, index: int, count: int, *, amd: bool) -> CpuidEntry:
    """``entry`` as vCPU ``index`` of ``count`` sees it (Intel SDM vol. 2 CPUID; AMD APM vol. 3 appendix E)."""
    bits = (count - 1).bit_length()  # of the APIC id that number the cores
    rounded = 1 << bits
    match entry.leaf:
        case 1:
            ebx = entry.ebx & 0x0000FFFF | min(rounded, 255) << 16 | (index & 0xFF) << 24
            edx = entry.edx | _HT if count > 1 else entry.edx & ~_HT
            return entry._replace(ebx=ebx, edx=edx)
        case 4 if entry.eax & 0x1F:  # a cache of Intel's: levels 1 and 2 are a core's own, 3 is shared by all
            level = entry.eax >> 5 & 7
            sharing = rounded - 1 if level >= 3 else 0
            return entry._replace(eax=entry.eax & 0x3FFF | (sharing & 0xFFF) << 14 | min(rounded - 1, 63) << 26)
        case 0xB:
            return _x2apic_level(entry, index, count, bits)
        case 0x80000001:
            several = _CMP_LEGACY if amd and count > 1 else 0
            return entry._replace(ecx=entry.ecx & ~_CMP_LEGACY | several)
        case 0x80000008:
            return entry._replace(ecx=entry.ecx & ~0xF0FF | min(count - 1, 255) | bits << 12)
        case 0x8000001D if entry.eax & 0x1F:  # the same for AMD
            level = entry.eax >> 5 & 7
            return entry._replace(eax=entry.eax & ~(0xFFF << 14) | ((count - 1 if level >= 3 else 0) & 0xFFF) << 14)
        case 0x8000001E:
            return entry._replace(eax=index, ebx=index & 0xFF, ecx=0)
        case _:
            return entry


def _x2apic_level(entry: CpuidEntry, index: int, count: int, bits: int) -> CpuidEntry:
    """Leaf 0xB: level 0 is the thread (one in a core), level 1 the core."""
    match entry.subleaf:
        case 0:
            return entry._replace(eax=0, ebx=1, ecx=0 | 1 << 8, edx=index)
        case 1:
            return entry._replace(eax=bits, ebx=count, ecx=1 | 2 << 8, edx=index)
        case level:
            return entry._replace(eax=0, ebx=0, ecx=level & 0xFF, edx=index)
