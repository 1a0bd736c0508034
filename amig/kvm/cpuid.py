"""What CPUID answers in the guest: the host's supported set less what can't be moved, and each vCPU's place in it."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from ..errors import UsageError
from .abi_numbers import CPUID_SIGNIFICANT_INDEX
from .cpuid_names import BIT_OF, WORDS, Word
from .topology import place_vcpu

_ENTRY = struct.Struct("<7I12x")
_HEADER = struct.Struct("<II")
MAX_ENTRIES = 256
"""KVM's own limit for a vCPU (KVM_MAX_CPUID_ENTRIES)."""


class CpuidEntry(NamedTuple):
    """One ``kvm_cpuid_entry2``."""

    leaf: int
    subleaf: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def pack_cpuid(entries: Sequence[CpuidEntry], *, room: int = 0) -> bytes:
    """A ``kvm_cpuid2`` with ``entries``, or an empty one with room for ``room`` of them."""
    count = room or len(entries)
    return (
        _HEADER.pack(count, 0) + b"".join(_ENTRY.pack(*entry) for entry in entries) + bytes(40 * (count - len(entries)))
    )


@functools.lru_cache(maxsize=8)  # asked for the same one several times while a guest is loaded, and waits
def unpack_cpuid(blob: bytes) -> tuple[CpuidEntry, ...]:
    """The entries of a ``kvm_cpuid2``. Raises ValueError if it is shorter than it says."""
    if len(blob) < _HEADER.size:
        raise ValueError("a CPUID table has at least 8 bytes")
    count, _ = _HEADER.unpack_from(blob)
    if len(blob) < _HEADER.size + 40 * count:
        raise ValueError(f"a CPUID table of {count} entries does not fit {len(blob)} bytes")
    return tuple(CpuidEntry(*_ENTRY.unpack_from(blob, _HEADER.size + 40 * number)) for number in range(count))


HIDDEN = frozenset({"vmx", "svm", "invtsc", "pdcm", "perfctr_core", "perfctr_nb", "perfctr_llc", "ibs", "intel_pt"})
"""Features whose state amig does not move, or that promise what a move breaks: guests of the guest, a TSC that never
stops, performance counters."""

_DROPPED_LEAVES = frozenset({0xA, 0x14, 0x1B, 0x1C, 0x1F, 0x23, 0x8000000A, 0x8000001B, 0x80000022})
"""The leaves that describe hidden features, and V2 topology (leaf 0xB says the same)."""

_NOT_COMPARED = frozenset(
    {"osxsave", "ospke", "apic", "ht", "cmp_legacy", "hypervisor", "x2apic", "tsc_deadline_timer"}
)
"""Bits that amig or KVM sets whatever the host's processor is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuModel:
    """A guest's processor: a name, and the CPUID entries before a vCPU's own numbers are put in."""

    name: str
    entries: tuple[CpuidEntry, ...]

    @classmethod
    def host(cls, supported: Iterable[CpuidEntry], *, hide: Iterable[str] = (), tsc_deadline: bool = False) -> Self:
        """All that the host supports and amig can move, less the features named in ``hide``.

        ``tsc_deadline``: the KVM has KVM_CAP_TSC_DEADLINE_TIMER and the VM in-kernel local APICs (older kernels do not
        report that feature by themselves). Raises UsageError for a feature name that is not known.
        """
        asked = sorted(set(hide))
        unknown = [name for name in asked if name not in BIT_OF]
        if unknown:
            raise UsageError(f"unknown CPU feature {', '.join(unknown)}: names are those of /proc/cpuinfo")
        clear: dict[Word, int] = {}
        for name in {*HIDDEN, *asked}:
            word, bit = BIT_OF[name]
            clear[word] = clear.get(word, 0) | 1 << bit
        entries = []
        for entry in supported:
            if entry.leaf in _DROPPED_LEAVES:
                continue
            changed = {
                word.register: getattr(entry, word.register) & ~mask
                for word, mask in clear.items()
                if (word.leaf, word.subleaf) == (entry.leaf, entry.subleaf)
            }
            entry = entry._replace(**changed)
            if entry.leaf == 1:
                ecx = entry.ecx | _bit("hypervisor") | (_bit("tsc_deadline_timer") if tsc_deadline else 0)
                entry = entry._replace(ecx=ecx & ~clear[Word(1, 0, "ecx")])
            entries.append(entry)
        return cls(name=",-".join(["host", *asked]), entries=tuple(entries))

    @property
    def vendor(self) -> str:
        """The processor's vendor, as CPUID leaf 0 spells it."""
        return _vendor(self.entries)

    def for_vcpu(self, index: int, count: int) -> tuple[CpuidEntry, ...]:
        """The entries for vCPU ``index`` of ``count``: APIC id and topology (one package, a core for each vCPU)."""
        amd = self.vendor in ("AuthenticAMD", "HygonGenuine")
        return tuple(place_vcpu(entry, index, count, amd=amd) for entry in self.entries)


def _bit(name: str) -> int:
    return 1 << BIT_OF[name][1]


def _vendor(entries: Iterable[CpuidEntry]) -> str:
    for entry in entries:
        if entry.leaf == 0:
            return struct.pack("<III", entry.ebx, entry.edx, entry.ecx).decode("latin-1")
    return "unknown"


def _word(entries: Iterable[CpuidEntry], word: Word) -> int:
    for entry in entries:
        if entry.leaf == word.leaf and (entry.subleaf == word.subleaf or not entry.flags & CPUID_SIGNIFICANT_INDEX):
            value: int = getattr(entry, word.register)
            return value
    return 0


def features(entries: Sequence[CpuidEntry]) -> frozenset[str]:
    """The names of all features that ``entries`` offer; unnamed bits as ``cpuid-7.0-edx-bit13``."""
    found = set()
    for word, names in WORDS.items():
        value = _word(entries, word)
        name_of = {bit: name for name, bit in names.items()}
        for bit in range(32):
            if value >> bit & 1:
                found.add(name_of.get(bit, f"cpuid-{word.leaf:x}.{word.subleaf}-{word.register}-bit{bit}"))
    return frozenset(found)


def compatible(source_model: CpuModel | Sequence[CpuidEntry], destination_supported: Sequence[CpuidEntry]) -> list[str]:
    """What a guest of ``source_model`` has and the destination lacks, by name; empty if the guest can move there.

    Pure: a list of feature names, led by ``vendor GenuineIntel`` or ``46 physical address bits`` where those differ.
    """
    entries = source_model.entries if isinstance(source_model, CpuModel) else source_model
    missing = []
    if _vendor(entries) != _vendor(destination_supported):
        missing.append(f"vendor {_vendor(entries)}")
    sizes = Word(0x80000008, 0, "eax")
    wanted, offered = _word(entries, sizes) & 0xFF, _word(destination_supported, sizes) & 0xFF
    if wanted > offered:
        missing.append(f"{wanted} physical address bits")
    missing += sorted(features(entries) - features(destination_supported) - _NOT_COMPARED)
    return missing
