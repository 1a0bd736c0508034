"""Guests that move for real, in one process: hosts with control sockets, migrations over them, the guest's own verdict.

Each host is what `amig run` and `amig receive` host; a migration opens the control socket as `amig migrate` does.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import amig
from amig.errors import GuestError
from amig.host import guest_abi as abi
from amig.host.boot import BootConfig
from amig.host.images import image_path
from amig.host.kvm_machine import KvmMachine, MachineConfig
from amig.host.machine import Machine
from amig.host.memory import MemfdMemory
from amig.host.service import HostService
from amig.sim.guest import SimMachine
from amig.sim.options import SimOptions

MIB = 1 << 20
CHECK = "workload=check ws=24M rate=100M report=0"
"""A small guest that checks itself, busy enough to need several rounds."""

_numbers = itertools.count(1)


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runtime and state directories of our own."""
    for name in ("run", "state"):
        (tmp_path / name).mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@dataclass
class Output:
    """What a guest wrote to its serial port."""

    data: bytearray = field(default_factory=bytearray)

    def __call__(self, data: bytes) -> None:
        self.data += data

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")


def machine_of(service: HostService) -> Machine:
    return service.hosted.machine


def cpus(machine: Machine) -> np.ndarray:
    return abi.parse_cpus(machine.memory.pages(0).reshape(-1), machine.vcpus)


async def until(condition, what: str, timeout: float = 60.0):  # type: ignore[no-untyped-def]
    """Wait until ``condition()`` is true and return what it returned."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, f"this did not happen in time: {what}"
        await asyncio.sleep(0.005)
    return result


def ask(memory: MemfdMemory, word: str) -> int:
    """Write a new number into a word of the control page, as a host does: the page is marked dirty."""
    offset = abi.CONTROL_GPA + abi.CONTROL.fields[word][1]  # type: ignore[index]
    number = int.from_bytes(memory.read(offset, 8), "little") + 1
    memory.write(offset, number.to_bytes(8, "little"))
    return number


async def ready(machine: Machine) -> None:
    """Wait until the guest's workload runs."""

    def runs() -> bool:
        if not abi.present(machine.memory.pages(0).reshape(-1)):
            return False
        status = abi.parse_status(machine.memory.pages(0).reshape(-1))
        assert status["state"] not in (abi.State.ERROR, abi.State.FAULT), status["message"]
        return bool(status["state"] == abi.State.RUNNING)

    await until(runs, "the guest's workload runs")


async def verdict(machine: Machine) -> int:
    """Have the guest verify its whole working set; returns all mismatches it ever found."""
    number = ask(machine.memory, "verify_request")
    await until(lambda: (cpus(machine)["verify_done"] == number).all(), "a full verified pass")
    found = cpus(machine)
    assert found["verified"].sum() > 0
    return int(found["mismatches"].sum() + found["verify_mismatches"].sum())


@asynccontextmanager
async def hosting(
    append: str = CHECK,
    *,
    engine: str = "kvm",
    memory: int = 64 * MIB,
    vcpus: int = 1,
    output: Output | None = None,
    **config: int,
) -> AsyncIterator[HostService]:
    """Host a guest of our own image until the block ends; ``config`` is more of `MachineConfig`."""
    service = HostService(f"guest{next(_numbers)}", sinks=(output,) if output else ())
    async with service:
        sink = service.console.write
        if engine == "kvm":
            machine_config = MachineConfig(memory=memory, vcpus=vcpus, **config)
            boot = BootConfig(kernel=image_path(), append=append)
            machine: Machine = await service.build(KvmMachine.boot, machine_config, boot, sink=sink)
        else:
            options = SimOptions.parse(append, vcpus=vcpus)
            machine = await service.build(SimMachine.boot, memory, options, serial=sink)
        await service.start(machine)
        await ready(machine)
        yield service


@asynccontextmanager
async def receiving(
    address: str = "tcp://127.0.0.1:0", *, output: Output | None = None, once: bool = False
) -> AsyncIterator[amig.Reception]:
    """Wait for a guest at an address until the block ends."""
    name = f"guest{next(_numbers)}"
    async with amig.Reception(address, name=name, sinks=(output,) if output else (), once=once) as reception:
        yield reception


async def move(source: HostService, destination: str, policy: amig.Policy | None = None, **more) -> amig.Result:  # type: ignore[no-untyped-def]
    """Migrate over the control socket, as `amig migrate` does."""
    async with amig.Migration(source.name, destination, policy, **more) as migration:
        pass
    return await migration.result()


async def alive(machine: Machine) -> None:
    """The guest gets on: its heartbeat advances."""
    before = cpus(machine)["heartbeat"].copy()
    await until(lambda: (cpus(machine)["heartbeat"] > before).all(), "the guest's heartbeat advances")


async def assert_stayed(service: HostService) -> None:
    """The guest runs on here, intact, with its dirty log off."""
    hosted = service.hosted
    assert hosted.state is amig.RunState.RUNNING
    assert hosted.hub.strategy is None, "the dirty log was left on"
    await alive(hosted.machine)
    assert await verdict(hosted.machine) == 0


__all__ = ["GuestError", "Output", "alive", "ask", "assert_stayed", "hosting", "move", "receiving", "verdict"]
