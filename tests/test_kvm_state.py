"""Device state on the wire: what is encoded comes back, and nothing broken gets as far as an ioctl."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from amig.errors import VerifyFailed
from amig.kvm.cpuid import CpuidEntry, pack_cpuid
from amig.kvm.state import VcpuState, VmState, decode, encode


def vcpu_state(**changes: Any) -> VcpuState:
    fields: dict[str, Any] = {
        "index": 0,
        "tsc_khz": 2_000_000,
        "cpuid": pack_cpuid([CpuidEntry(0, 0, 0, 1, 2, 3, 4)]),
        "events": bytes(64),
        "mp_state": 0,
        "regs": bytes(144),
        "xsave": bytes(4096),
        "xcrs": bytes(392),
        "sregs": bytes(320),
        "msrs": ((0x10, (1 << 64) - 1), (0x3B, 0)),
        "lapic": bytes(1024),
        "debugregs": bytes(128),
    }
    return VcpuState(**{**fields, **changes})


def vm_state(**changes: Any) -> VmState:
    return VmState(**{"irqchips": (bytes(512),) * 3, "pit": bytes(112), "clock": 123456789, **changes})


@pytest.mark.parametrize(
    "state",
    [
        vcpu_state(),
        vcpu_state(sregs=bytes(312), lapic=None, xsave=bytes(11008)),
        vm_state(),
        vm_state(irqchips=(), pit=None, clock=0),
    ],
)
def test_what_is_encoded_comes_back(state: VcpuState | VmState) -> None:
    assert decode(encode(state)) == state


@dataclass(frozen=True)
class Bad:
    state: VcpuState | VmState
    text: str


BAD = [
    Bad(vcpu_state(version=2), "version 2, this amig reads 1"),
    Bad(vcpu_state(index=1 << 20), "vCPU 1048576 does not exist"),
    Bad(vcpu_state(tsc_khz=0), "a TSC of 0 kHz"),
    Bad(vcpu_state(mp_state=99), "unknown run state 99"),
    Bad(vcpu_state(events=bytes(63)), "EVENTS has 63 bytes instead of 64"),
    Bad(vcpu_state(regs=bytes(145)), "REGS has 145 bytes instead of 144"),
    Bad(vcpu_state(xcrs=b""), "XCRS has 0 bytes"),
    Bad(vcpu_state(debugregs=bytes(1)), "DEBUGREGS has 1 bytes"),
    Bad(vcpu_state(sregs=bytes(319)), "SREGS2 has 319 bytes"),
    Bad(vcpu_state(lapic=bytes(4096)), "LAPIC has 4096 bytes"),
    Bad(vcpu_state(xsave=bytes(4092)), "XSAVE has 4092 bytes"),
    Bad(vcpu_state(xsave=bytes(1 << 17)), "XSAVE has 131072 bytes"),
    Bad(vcpu_state(xsave=bytes(4097)), "XSAVE has 4097 bytes"),
    Bad(vcpu_state(msrs=((0, 0),) * 5000), "too many MSRs"),
    Bad(vcpu_state(msrs=((0, -1),)), "more than 64 bits"),
    Bad(vcpu_state(cpuid=bytes(7)), "at least 8 bytes"),
    Bad(vcpu_state(cpuid=struct.pack("<II", 1 << 30, 0)), "does not fit 8 bytes"),
    Bad(vcpu_state(cpuid=pack_cpuid((), room=300)), "CPUID has 12008 bytes"),
    Bad(vcpu_state(cpuid=pack_cpuid((), room=3) + b"x"), "CPUID has 129 bytes"),
    Bad(vm_state(version=0), "version 0"),
    Bad(vm_state(irqchips=(bytes(512),)), "1 interrupt controllers"),
    Bad(vm_state(irqchips=(bytes(512), bytes(512), bytes(5))), "an interrupt controller has 5 bytes"),
    Bad(vm_state(pit=bytes(111)), "the timer has 111 bytes"),
    Bad(vm_state(clock=-1), "a KVM clock of -1 ns"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.text)
def test_every_part_is_checked(bad: Bad) -> None:
    with pytest.raises(VerifyFailed, match=bad.text):
        decode(encode(bad.state))


def sealed(body: bytes) -> bytes:
    return struct.pack("<4sIQ", b"AKS1", len(body), xxhash.xxh3_64_intdigest(body)) + body


def test_unknown_fields_and_wrong_types_are_refused() -> None:
    fields = {"type": "vm", "version": 1, "irqchips": [], "pit": None, "clock": 1}
    assert decode(sealed(msgspec.msgpack.encode(fields))) == vm_state(irqchips=(), pit=None, clock=1)
    for wrong in (
        {**fields, "extra": 1},
        {**fields, "clock": "1"},
        {**fields, "type": "disk"},
        {"type": "vcpu"},
        [1],
        7,
    ):
        with pytest.raises(VerifyFailed, match="the device state is broken"):
            decode(sealed(msgspec.msgpack.encode(wrong)))


def test_damage_is_noticed_wherever_it_is() -> None:
    blob = encode(vm_state())
    for position in range(0, len(blob), 13):
        damaged = bytearray(blob)
        damaged[position] ^= 0x10
        with pytest.raises(VerifyFailed):
            decode(bytes(damaged))
    for length in (0, 15, 16, len(blob) - 1):
        with pytest.raises(VerifyFailed, match=r"cut off|header is wrong"):
            decode(blob[:length])
    with pytest.raises(VerifyFailed, match="header is wrong"):
        decode(blob + b"x")


def test_a_state_above_the_limit_is_not_even_parsed() -> None:
    blob = encode(vm_state())
    with pytest.raises(VerifyFailed, match="more than the limit of 100"):
        decode(blob, limit=100)


@given(st.binary(max_size=300))
def test_noise_never_gets_through(noise: bytes) -> None:
    for blob in (noise, sealed(noise)):
        with pytest.raises(VerifyFailed):
            decode(blob)
