"""Machine descriptions and device states, down to what would go into an ioctl; and the simulated machine's own."""

from __future__ import annotations

import contextlib
import ctypes
import random
import struct
from collections.abc import Callable, Iterator

import msgspec
import xxhash

from amig.errors import AmigError
from amig.host import kvm_state as host_state
from amig.host.life import MachineEnvelope, StateEnvelope
from amig.host.platform import PowerState
from amig.host.serial import SerialState
from amig.kvm import state as kvm_state
from amig.kvm.abi_numbers import MpState
from amig.kvm.abi_vcpu import KvmDebugregs, KvmLapicState, KvmRegs, KvmSregs2, KvmVcpuEvents, KvmXcrs
from amig.kvm.abi_vm import KvmPitState2
from amig.kvm.cpuid import CpuidEntry, pack_cpuid
from amig.memory import MemoryMap, Region, Slot
from amig.sim.guest import SimMachine
from amig.sim.options import SimOptions

from .target import Mutate, Target

_ENVELOPE = struct.Struct("<4sIQ")
SIZE = 8 << 20
SMALL = MemoryMap(
    generation=1,
    regions=(Region(id=0, size=SIZE),),
    slots=(Slot(index=0, guest_phys=0, size=SIZE, region=0, offset=0),),
)
CPUID = (CpuidEntry(0, 0, 0, 1, 2, 3, 4),)


def run(data: bytes) -> None:
    kind, rest = data[:1], data[1:]
    way = _WAYS.get(kind)
    if way is None:
        return
    with contextlib.suppress(AmigError):
        way(rest)


def _description(data: bytes) -> None:
    found = host_state.decode_description(data)
    found.model()
    found.check(CPUID)


def _state(data: bytes) -> None:
    vm, vcpus = host_state.decode_state(data).open()
    vm.check()
    for vcpu in vcpus:
        _registers(vcpu)


def _envelope(data: bytes) -> None:
    found = kvm_state.decode(data)
    if isinstance(found, kvm_state.VcpuState):
        _registers(found)


def _registers(vcpu: kvm_state.VcpuState) -> None:
    """What a restore does with it before the first ioctl."""
    KvmRegs.from_blob(vcpu.regs)
    KvmXcrs.from_blob(vcpu.xcrs)
    KvmDebugregs.from_blob(vcpu.debugregs)
    KvmVcpuEvents.from_blob(vcpu.events)
    MpState(vcpu.mp_state)
    dict(vcpu.msrs)
    pack_cpuid(vcpu.cpuid_entries())


def _simulated(data: bytes) -> None:
    machine = SimMachine.build_like(data, SMALL)
    machine.close()


def _simulated_state(data: bytes) -> None:
    machine = SimMachine.build_like(_options(), SMALL)
    try:
        machine.load(data)
    finally:
        machine.close()


_WAYS: dict[bytes, Callable[[bytes], None]] = {
    b"D": _description,
    b"S": _state,
    b"E": _envelope,
    b"O": _simulated,
    b"L": _simulated_state,
}


def mutate(data: bytes, most: int, seed: int, by: Mutate) -> bytes:
    """Change the content; an envelope's length and checksum mostly stay right, also within a machine's state."""
    rng = random.Random(seed)
    if not data or rng.randrange(8) == 0:
        return by(data, most)
    kind, rest = data[:1], data[1:]
    if kind == b"E":
        return kind + mend(rest[: _ENVELOPE.size] + by(rest[_ENVELOPE.size :], most - 17))
    if kind == b"S" and rng.randrange(2):
        try:
            state = msgspec.msgpack.decode(rest, type=host_state.MachineState)
        except ValueError:
            return kind + by(rest, most - 1)
        at = rng.randrange(len(state.vcpus) + 1)
        parts = [*state.vcpus, state.vm]
        parts[at] = mend(parts[at][: _ENVELOPE.size] + by(parts[at][_ENVELOPE.size :], len(parts[at]) + 64))
        state = msgspec.structs.replace(state, vcpus=tuple(parts[:-1]), vm=parts[-1])
        return (kind + msgspec.msgpack.encode(state))[:most]
    return kind + by(rest, most - 1)


def mend(blob: bytes) -> bytes:
    """Put an envelope's length and checksum right."""
    if len(blob) < _ENVELOPE.size:
        return blob
    body = blob[_ENVELOPE.size :]
    return _ENVELOPE.pack(blob[:4], len(body), xxhash.xxh3_64_intdigest(body)) + body


def _options() -> bytes:
    machine = SimMachine.build_like(
        msgspec.msgpack.encode({"version": 1, "options": SimOptions.parse("workload=check ws=1M", vcpus=1)}), SMALL
    )
    machine.close()
    return machine.describe()


def _vcpu(index: int) -> kvm_state.VcpuState:
    return kvm_state.VcpuState(
        index=index,
        tsc_khz=2_000_000,
        cpuid=pack_cpuid(CPUID),
        events=bytes(ctypes.sizeof(KvmVcpuEvents)),
        mp_state=0,
        regs=bytes(ctypes.sizeof(KvmRegs)),
        xsave=bytes(4096),
        xcrs=bytes(ctypes.sizeof(KvmXcrs)),
        sregs=bytes(ctypes.sizeof(KvmSregs2)),
        msrs=((0x10, 1), (0x174, 2)),
        lapic=bytes(ctypes.sizeof(KvmLapicState)),
        debugregs=bytes(ctypes.sizeof(KvmDebugregs)),
    )


def seeds() -> Iterator[tuple[str, bytes]]:
    description = host_state.Description(
        version=host_state.DESCRIPTION_VERSION,
        vcpus=2,
        cpu="host",
        cpuid=pack_cpuid(CPUID),
        seen=pack_cpuid(CPUID),
        tsc_khz=2_000_000,
        devices=host_state.DEVICES,
    )
    yield "description", b"D" + host_state.encode(description)
    vm = kvm_state.VmState(irqchips=(bytes(512),) * 3, pit=bytes(ctypes.sizeof(KvmPitState2)), clock=5)
    yield "envelope-vm", b"E" + kvm_state.encode(vm)
    yield "envelope-vcpu", b"E" + kvm_state.encode(_vcpu(0))
    state = host_state.MachineState(
        version=host_state.STATE_VERSION,
        vm=kvm_state.encode(vm),
        vcpus=(kvm_state.encode(_vcpu(0)),),
        com1=SerialState(backlog=b"typed"),
        power=PowerState(),
    )
    yield "state", b"S" + host_state.encode(state)
    yield "simulated", b"O" + _options()
    machine = SimMachine.build_like(_options(), SMALL)
    yield "simulated-state", b"L" + _still(machine.save())
    machine.close()
    yield "machine-envelope", b"D" + msgspec.msgpack.encode(MachineEnvelope(engine="kvm", description=b"x"))
    yield "state-envelope", b"S" + msgspec.msgpack.encode(StateEnvelope(machine=b"x"))


def _still(state: bytes) -> bytes:
    """The same bytes each time: without the clock."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(state) | {"tsc": 12345})


TARGET = Target(
    name="states",
    run=run,
    seeds=seeds,
    most=24 << 10,
    memory=8 << 20,
    mutate=mutate,
    words=tuple(
        field.encode()
        for field in (
            *kvm_state.VcpuState.__struct_fields__,
            *kvm_state.VmState.__struct_fields__,
            *host_state.Description.__struct_fields__,
            *host_state.MachineState.__struct_fields__,
            *SimOptions.__struct_fields__,
        )
    ),
)
