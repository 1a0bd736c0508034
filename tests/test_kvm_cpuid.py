"""CPUID models: what is hidden, each vCPU's numbers, and what a destination lacks, by name."""

from __future__ import annotations

import struct

import pytest

from amig.errors import UsageError
from amig.kvm.cpuid import CpuidEntry, CpuModel, compatible, features, pack_cpuid, unpack_cpuid
from amig.kvm.cpuid_names import BIT_OF, WORDS

VMX, TSC_DEADLINE, HYPERVISOR, HT = 1 << 5, 1 << 24, 1 << 31, 1 << 28


def entry(leaf: int, subleaf: int = 0, *, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> CpuidEntry:
    return CpuidEntry(leaf, subleaf, 1 if leaf in (4, 7, 0xB, 0xD, 0x8000001D) else 0, eax, ebx, ecx, edx)


def host(vendor: bytes = b"GenuineIntel") -> tuple[CpuidEntry, ...]:
    ebx, edx, ecx = struct.unpack("<III", vendor)
    return (
        entry(0, eax=0x16, ebx=ebx, ecx=ecx, edx=edx),
        entry(1, eax=0x50654, ebx=0x0810_0800, ecx=0x201 | VMX, edx=0x178B_FBFF),
        entry(4, 0, eax=0x1C004121),
        entry(4, 3, eax=0x1C03C163),
        entry(7, 0, ebx=1 << 5 | 1 << 16, ecx=1 << 2, edx=1 << 13),
        entry(0xA, eax=0x07300404),
        entry(0xB, 0),
        entry(0xB, 1),
        entry(0xB, 2),
        entry(0xD, 0, eax=7),
        entry(0x40000000, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D),
        entry(0x40000001, eax=0x0100_0009),
        entry(0x80000001, ecx=1 | 1 << 2, edx=1 << 29),
        entry(0x80000007, edx=1 << 8),
        entry(0x80000008, eax=0x302E),
        entry(0x8000001D, 3, eax=0x163),
        entry(0x8000001E),
    )


def at(entries: tuple[CpuidEntry, ...], leaf: int, subleaf: int = 0) -> CpuidEntry:
    return next(e for e in entries if (e.leaf, e.subleaf) == (leaf, subleaf))


def test_names_are_unique_and_every_bit_has_one_name() -> None:
    assert len(BIT_OF) == sum(len(names) for names in WORDS.values())
    for names in WORDS.values():
        assert max(names.values()) < 32


@pytest.mark.parametrize(
    ("name", "leaf", "subleaf", "register", "bit"),
    [
        ("hypervisor", 1, 0, "ecx", 31),
        ("pbe", 1, 0, "edx", 31),
        ("avx512vl", 7, 0, "ebx", 31),
        ("pks", 7, 0, "ecx", 31),
        ("ssbd", 7, 0, "edx", 31),
        ("lam", 7, 1, "eax", 26),
        ("xfd", 0xD, 1, "eax", 4),
        ("xcr0_tiledata", 0xD, 0, "eax", 18),
        ("kvmclock_stable", 0x40000001, 0, "eax", 24),
        ("mwaitx", 0x80000001, 0, "ecx", 29),
        ("3dnow", 0x80000001, 0, "edx", 31),
        ("invtsc", 0x80000007, 0, "edx", 8),
        ("amd_psfd", 0x80000008, 0, "ebx", 28),
        ("autoibrs", 0x80000021, 0, "eax", 8),
    ],
)
def test_names_stand_at_the_right_bit(name: str, leaf: int, subleaf: int, register: str, bit: int) -> None:
    assert BIT_OF[name] == ((leaf, subleaf, register), bit)


def test_the_host_model_hides_what_cannot_be_moved_and_shows_the_hypervisor() -> None:
    model = CpuModel.host(host())
    assert (model.name, model.vendor) == ("host", "GenuineIntel")
    offered = features(model.entries)
    assert not offered & {"vmx", "svm", "invtsc"}
    assert {"sse3", "avx2", "avx512f", "hypervisor", "kvmclock"} <= offered
    assert at(model.entries, 0x40000000).ebx == 0x4B4D564B  # the KVM signature
    assert 0xA not in {e.leaf for e in model.entries}
    assert at(model.entries, 1).ecx & TSC_DEADLINE == 0
    assert at(CpuModel.host(host(), tsc_deadline=True).entries, 1).ecx & TSC_DEADLINE


def test_features_can_be_hidden_by_name() -> None:
    model = CpuModel.host(host(), hide=["avx2", "avx512f", "tsc_deadline_timer", "hypervisor"], tsc_deadline=True)
    assert model.name == "host,-avx2,-avx512f,-hypervisor,-tsc_deadline_timer"
    assert not features(model.entries) & {"avx2", "avx512f", "tsc_deadline_timer", "hypervisor"}
    with pytest.raises(UsageError, match="unknown CPU feature avx1024"):
        CpuModel.host(host(), hide=["avx1024"])


def test_each_vcpu_has_its_own_numbers() -> None:
    model = CpuModel.host(host())
    for index in range(3):
        entries = model.for_vcpu(index, 3)
        one = at(entries, 1)
        assert one.ebx >> 24 == index
        assert one.ebx >> 16 & 0xFF == 4  # APIC ids reserved: three, rounded up
        assert one.ebx & 0xFFFF == 0x0800
        assert one.edx & HT
        assert [at(entries, 0xB, level).edx for level in range(3)] == [index] * 3
        assert (at(entries, 0xB, 0).eax, at(entries, 0xB, 0).ecx) == (0, 0x100)
        assert (at(entries, 0xB, 1).eax, at(entries, 0xB, 1).ebx, at(entries, 0xB, 1).ecx) == (2, 3, 0x201)
        assert at(entries, 4, 0).eax >> 14 & 0xFFF == 0  # its own
        assert at(entries, 4, 3).eax >> 14 & 0xFFF == 3  # shared by all
        assert at(entries, 4, 0).eax >> 26 == 3
        assert at(entries, 0x80000008).ecx == 2 | 2 << 12
        assert at(entries, 0x8000001E).eax == index
        assert at(entries, 0x80000001).ecx & 2 == 0  # AMD's bit


def test_a_single_vcpu_is_no_multiprocessor() -> None:
    entries = CpuModel.host(host(b"AuthenticAMD")).for_vcpu(0, 1)
    assert at(entries, 1).edx & HT == 0
    assert at(entries, 0x80000001).ecx & 2 == 0
    assert at(CpuModel.host(host(b"AuthenticAMD")).for_vcpu(0, 2), 0x80000001).ecx & 2


def test_a_guest_can_move_to_an_equal_or_better_host() -> None:
    model = CpuModel.host(host(), tsc_deadline=True)
    assert compatible(model, host()) == []
    assert compatible(model.for_vcpu(1, 4), host()) == []
    better = tuple(e._replace(ebx=e.ebx | 1 << 8) if e.leaf == 7 else e for e in host())
    assert compatible(model, better) == []
    assert compatible(CpuModel.host(better), host()) == ["bmi2"]


def test_what_is_missing_is_named() -> None:
    poorer = tuple(e._replace(ebx=0, edx=0) if e.leaf == 7 else e for e in host(b"AuthenticAMD"))
    poorer = tuple(e._replace(eax=0x302A) if e.leaf == 0x80000008 else e for e in poorer)
    assert compatible(CpuModel.host(host()), poorer) == [
        "vendor GenuineIntel",
        "46 physical address bits",
        "avx2",
        "avx512f",
        "cpuid-7.0-edx-bit13",
    ]
    assert compatible(CpuModel.host(host()), ())[0] == "vendor GenuineIntel"


def test_hiding_a_feature_makes_the_guest_fit() -> None:
    poorer = tuple(e._replace(ebx=0) if e.leaf == 7 else e for e in host())
    assert compatible(CpuModel.host(host(), hide=["avx2", "avx512f"]), poorer) == []


def test_tables_pack_and_unpack() -> None:
    assert unpack_cpuid(pack_cpuid(host())) == host()
    assert unpack_cpuid(pack_cpuid((), room=2)) == (CpuidEntry(0, 0, 0, 0, 0, 0, 0),) * 2
    for broken in (b"", b"\x01\0\0\0", b"\x02\0\0\0\0\0\0\0" + bytes(40), b"\xff" * 48):
        with pytest.raises(ValueError, match="CPUID table"):
            unpack_cpuid(broken)
