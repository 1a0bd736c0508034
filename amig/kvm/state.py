"""A guest's processors and board as data that travel: plain numbers and the kernel's blobs, versioned and checked.

``encode`` and ``decode`` put them into a checksummed envelope. What comes in is hostile: its length is limited before
it is parsed, unknown fields are refused, and every blob's size is checked before any ioctl sees it.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Annotated

import msgspec
import xxhash

from ..errors import VerifyFailed
from .abi_numbers import MpState
from .abi_vcpu import KvmDebugregs, KvmLapicState, KvmRegs, KvmSregs, KvmSregs2, KvmVcpuEvents, KvmXcrs
from .abi_vm import KvmPitState2
from .cpuid import MAX_ENTRIES, CpuidEntry, unpack_cpuid

VERSION = 1
MOST_BYTES = 1 << 20
"""An encoded state is a few kilobytes; with all of AMX and every MSR it stays below 32 KiB."""

U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]

_MOST_XSAVE = 1 << 16
_MOST_MSRS = 4096


def _expect(what: str, blob: bytes, size: int) -> None:
    if len(blob) != size:
        raise VerifyFailed(f"the device state is broken: {what} has {len(blob)} bytes instead of {size}")


class VcpuState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="vcpu"):
    """All of one vCPU. Blobs are the kernel's structures as they are; taken by ``amig.kvm.snapshot.save_vcpu``."""

    version: int = VERSION
    index: U32
    tsc_khz: U32
    """The TSC frequency that the guest counts on."""
    cpuid: bytes
    """``kvm_cpuid2`` with its entries."""
    events: bytes
    mp_state: U32
    regs: bytes
    xsave: bytes
    """4096 bytes or more (KVM_GET_XSAVE2)."""
    xcrs: bytes
    sregs: bytes
    """``kvm_sregs2`` (320 bytes), or ``kvm_sregs`` (312) from a kernel before 5.14."""
    msrs: tuple[tuple[U32, int], ...]
    lapic: bytes | None
    """None without in-kernel interrupt controllers."""
    debugregs: bytes

    def check(self) -> None:
        """Raise VerifyFailed unless every part has the size and range that the kernel's calls take."""
        _check_version(self.version)
        if self.index >= 1 << 16:
            raise VerifyFailed(f"the device state is broken: vCPU {self.index} does not exist")
        if not 1000 <= self.tsc_khz <= 100_000_000:
            raise VerifyFailed(f"the device state is broken: a TSC of {self.tsc_khz} kHz")
        if self.mp_state not in set(MpState):
            raise VerifyFailed(f"the device state is broken: unknown run state {self.mp_state}")
        _expect("EVENTS", self.events, ctypes.sizeof(KvmVcpuEvents))
        _expect("REGS", self.regs, ctypes.sizeof(KvmRegs))
        _expect("XCRS", self.xcrs, ctypes.sizeof(KvmXcrs))
        _expect("DEBUGREGS", self.debugregs, ctypes.sizeof(KvmDebugregs))
        if len(self.sregs) != ctypes.sizeof(KvmSregs):
            _expect("SREGS2", self.sregs, ctypes.sizeof(KvmSregs2))
        if self.lapic is not None:
            _expect("LAPIC", self.lapic, ctypes.sizeof(KvmLapicState))
        if not 4096 <= len(self.xsave) <= _MOST_XSAVE or len(self.xsave) % 4:
            raise VerifyFailed(f"the device state is broken: XSAVE has {len(self.xsave)} bytes")
        if len(self.msrs) > _MOST_MSRS or any(not 0 <= value < 1 << 64 for _, value in self.msrs):
            raise VerifyFailed("the device state is broken: too many MSRs, or one of more than 64 bits")
        self.cpuid_entries()

    def cpuid_entries(self) -> tuple[CpuidEntry, ...]:
        """The CPUID entries. Raises VerifyFailed if the blob is not a table of them."""
        try:
            entries = unpack_cpuid(self.cpuid)
        except ValueError as error:
            raise VerifyFailed(f"the device state is broken: {error}") from None
        if len(entries) > MAX_ENTRIES or len(self.cpuid) != 8 + 40 * len(entries):
            raise VerifyFailed(f"the device state is broken: CPUID has {len(self.cpuid)} bytes")
        return entries


class VmState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="vm"):
    """What belongs to no vCPU: interrupt controllers, timer, clock; taken by ``amig.kvm.snapshot.save_vm``."""

    version: int = VERSION
    irqchips: tuple[bytes, ...]
    """PIC master, PIC slave, IOAPIC, 512 bytes each; or nothing."""
    pit: bytes | None
    clock: int
    """The KVM clock when the guest stopped, in nanoseconds."""

    def check(self) -> None:
        """Raise VerifyFailed unless every part has the size and range that the kernel's calls take."""
        _check_version(self.version)
        if len(self.irqchips) not in (0, 3):
            raise VerifyFailed(f"the device state is broken: {len(self.irqchips)} interrupt controllers")
        for chip in self.irqchips:
            _expect("an interrupt controller", chip, 512)
        if self.pit is not None:
            _expect("the timer", self.pit, ctypes.sizeof(KvmPitState2))
        if not 0 <= self.clock < 1 << 63:
            raise VerifyFailed(f"the device state is broken: a KVM clock of {self.clock} ns")


def _check_version(version: int) -> None:
    if version != VERSION:
        raise VerifyFailed(
            f"the device state has version {version}, this amig reads {VERSION}: use the same amig on both sides"
        )


_ENVELOPE = struct.Struct("<4sIQ")
_MAGIC = b"AKS1"
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(VcpuState | VmState)


def encode(state: VcpuState | VmState) -> bytes:
    """``state`` with a header of 16 bytes: magic, length, xxh3 of what follows (MessagePack)."""
    body = _encoder.encode(state)
    return _ENVELOPE.pack(_MAGIC, len(body), xxhash.xxh3_64_intdigest(body)) + body


def decode(blob: bytes, *, limit: int = MOST_BYTES) -> VcpuState | VmState:
    """What `encode` made, checked. Raises VerifyFailed for anything else, or for more than ``limit`` bytes."""
    if len(blob) > limit:
        raise VerifyFailed(f"the device state is broken: {len(blob)} bytes, more than the limit of {limit}")
    if len(blob) < _ENVELOPE.size:
        raise VerifyFailed("the device state is broken: it is cut off")
    magic, length, digest = _ENVELOPE.unpack_from(blob)
    body = memoryview(blob)[_ENVELOPE.size :]
    if magic != _MAGIC or length != len(body):
        raise VerifyFailed("the device state is broken: its header is wrong, or it is cut off")
    if xxhash.xxh3_64_intdigest(body) != digest:
        raise VerifyFailed("the device state was damaged on its way: its checksum is wrong")
    try:
        state: VcpuState | VmState = _decoder.decode(body)
    except (ValueError, RecursionError) as error:  # what msgspec refuses, and text that is no UTF-8
        raise VerifyFailed(f"the device state is broken: {error}") from None
    state.check()
    return state
