"""What travels of a KVM machine: its description, before the memory, and its state, after. Both hostile on arrival."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec

from amig.errors import Refused, VerifyFailed
from amig.host.platform import PowerState
from amig.host.serial import SerialState
from amig.kvm import state as kvm_state
from amig.kvm.cpuid import CpuidEntry, CpuModel, compatible, pack_cpuid, unpack_cpuid

DESCRIPTION_VERSION = 1
STATE_VERSION = 1
MAX_DESCRIPTION_BYTES = 256 << 10
MAX_VCPUS = 64
MAX_STATE_BYTES = 16 << 20
_MOST_CPUID_BYTES = 8 + 40 * 256

DEVICES = ("irqchip/1", "pit/1", "serial16550/1", "acpi-pm/1")
WAIT_PORT_DEVICE = "amig-wait-port/1"
_KNOWN = frozenset({*DEVICES, WAIT_PORT_DEVICE})

_S = TypeVar("_S", bound=msgspec.Struct)


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="kvm"):
    """All that is fixed when a machine is built, beside its memory map."""

    version: int
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=MAX_VCPUS)]
    cpu: Annotated[str, msgspec.Meta(max_length=4096)]
    """Name of the processor model, for people."""
    cpuid: Annotated[bytes, msgspec.Meta(max_length=_MOST_CPUID_BYTES)]
    """``kvm_cpuid2`` of the model, before a vCPU's own numbers are put in."""
    seen: Annotated[bytes, msgspec.Meta(max_length=_MOST_CPUID_BYTES)]
    """What CPUID really answers in the guest: what a destination must be able to offer."""
    tsc_khz: Annotated[int, msgspec.Meta(ge=1000, le=100_000_000)]
    devices: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=64)], ...], msgspec.Meta(max_length=64)]
    """Each with the version of its registers and state."""

    @classmethod
    def of(
        cls, *, vcpus: int, model: CpuModel, seen: Sequence[CpuidEntry], tsc_khz: int, wait_port: bool
    ) -> Description:
        """Describe a machine that was built here."""
        return cls(
            version=DESCRIPTION_VERSION,
            vcpus=vcpus,
            cpu=model.name,
            # As vCPU 0 has it: KVM's own list holds the number of the host's processor that happened to be asked.
            cpuid=pack_cpuid(model.for_vcpu(0, vcpus)),
            seen=pack_cpuid(seen),
            tsc_khz=tsc_khz,
            devices=(*DEVICES, *([WAIT_PORT_DEVICE] if wait_port else [])),
        )

    def model(self) -> CpuModel:
        """Return the processor; raises `Refused` when the table is malformed."""
        return CpuModel(name=self.cpu, entries=_entries(self.cpuid))

    def check(self, offered: Sequence[CpuidEntry]) -> None:
        """Raise `Refused`, naming everything that a host which offers this CPUID lacks."""
        if self.version != DESCRIPTION_VERSION:
            raise Refused(
                f"the machine's description has version {self.version}, this amig reads {DESCRIPTION_VERSION}: "
                "use the same amig on both sides"
            )
        unknown = [d for d in self.devices if d not in _KNOWN]
        missing = [d for d in DEVICES if d not in self.devices]
        if unknown or missing or len(set(self.devices)) != len(self.devices):
            raise Refused(
                f"the machine has other devices than this amig makes: {', '.join(unknown + missing) or 'some twice'}; "
                "use the same amig on both sides"
            )
        if lacking := compatible(_entries(self.seen), offered):
            raise Refused(
                f"this host's processor lacks what the guest may use: {', '.join(lacking)}; "
                f"start the guest without them (--cpu {','.join(['host', *(f'-{name}' for name in lacking)])}), "
                "or move it to a host that has them"
            )


def _entries(table: bytes) -> tuple[CpuidEntry, ...]:
    try:
        return unpack_cpuid(table)
    except ValueError as error:
        raise Refused(f"the machine's description is malformed: {error}") from None


class MachineState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="kvm-state"):
    """All that a paused machine knows beside its memory; vCPUs and VM in envelopes with checksums of their own."""

    version: int
    vm: bytes
    vcpus: Annotated[tuple[bytes, ...], msgspec.Meta(min_length=1, max_length=MAX_VCPUS)]
    com1: SerialState
    power: PowerState

    def open(self) -> tuple[kvm_state.VmState, list[kvm_state.VcpuState]]:
        """Decode and check the parts; raises `VerifyFailed`."""
        if self.version != STATE_VERSION:
            raise VerifyFailed(
                f"the device state has version {self.version}, this amig reads {STATE_VERSION}: "
                "use the same amig on both sides"
            )
        vm = kvm_state.decode(self.vm)
        vcpus = [kvm_state.decode(blob) for blob in self.vcpus]
        if not isinstance(vm, kvm_state.VmState):
            raise VerifyFailed("the device state is broken: its VM part is something else")
        opened = [v for v in vcpus if isinstance(v, kvm_state.VcpuState)]
        if [v.index for v in opened] != list(range(len(vcpus))):
            raise VerifyFailed("the device state is broken: its vCPUs are not numbered one after the other")
        return vm, opened


_state_decoder = msgspec.msgpack.Decoder(MachineState)
"""Made beforehand: it takes a millisecond, and the guest would wait for it."""


def encode(value: Description | MachineState) -> bytes:
    """Return it as MessagePack."""
    return msgspec.msgpack.encode(value)


def decode_description(data: bytes) -> Description:
    """Read a description from outside; raises `Refused`."""
    if len(data) > MAX_DESCRIPTION_BYTES:
        raise Refused(f"the machine's description has {len(data)} bytes, more than {MAX_DESCRIPTION_BYTES}")
    try:
        return msgspec.msgpack.decode(data, type=Description)
    except (ValueError, RecursionError) as error:  # text that is no UTF-8, too
        raise Refused(f"the machine's description can't be read: {error}; is it a KVM guest of this amig?") from None


def decode_state(data: bytes) -> MachineState:
    """Read a state from outside; raises `VerifyFailed`."""
    if len(data) > MAX_STATE_BYTES:
        raise VerifyFailed(f"the device state has {len(data)} bytes, more than {MAX_STATE_BYTES}")
    try:
        return _state_decoder.decode(data)
    except (ValueError, RecursionError) as error:  # text that is no UTF-8, too
        raise VerifyFailed(f"the device state is broken: {error}") from None
