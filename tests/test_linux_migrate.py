"""A stock Linux under way: its shell session goes on while it moves, and its kernel has nothing to complain about."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import amig
from amig.host.boot import BootConfig
from amig.host.kvm_machine import KvmMachine, MachineConfig
from amig.host.service import HostService
from tests.moving import (
    Output,
    homes,  # noqa: F401 - a fixture
    machine_of,
    move,
    receiving,
)
from tests.test_linux import APPEND, LOOK, MIB, bad_lines, initrd, kernel  # noqa: F401 - fixtures among them

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400), pytest.mark.usefixtures("homes")]
PATIENT = amig.Policy(downtime=0.3, timeout=120, on_timeout="switch")


class Shell:
    """A person at the console, who does not notice where the guest is."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.service: HostService | None = None
        self.seen = 0
        self.asked = 0

    async def wait_for(self, text: bytes, timeout: float = 120.0) -> str:
        """Wait for text at the console; returns what came up to it."""
        start = self.seen
        try:
            async with asyncio.timeout(timeout):
                while (at := self.output.data.find(text, self.seen)) < 0:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pytest.fail(f"no {text!r} after:\n{self.output.text[-3000:]}")
        self.seen = at + len(text)
        return self.output.data[start : self.seen].decode(errors="replace")

    async def ask(self, command: str) -> str:
        """Type a command and return what it printed."""
        assert self.service is not None
        self.asked += 1
        machine_of(self.service).serial_input(f"{command}; echo e''nd{self.asked}\n".encode())
        return await self.wait_for(b"end%d\r\n" % self.asked)


@pytest.mark.parametrize("vcpus", [1, pytest.param(2, marks=pytest.mark.soak)])
async def test_a_shell_session_goes_on_while_its_linux_moves(vcpus: int, initrd: Path) -> None:  # noqa: F811
    output = Output()
    shell = Shell(output)
    service = HostService("linux", sinks=(output,))
    async with service, receiving(output=output) as target:
        config = MachineConfig(memory=256 * MIB, vcpus=vcpus)
        boot = BootConfig(kernel=kernel(), initrd=initrd, append=APPEND)
        machine = await service.build(KvmMachine.boot, config, boot, sink=service.console.write)
        await service.start(machine)
        shell.service = service
        await shell.wait_for(b"%d processors" % vcpus)
        await shell.ask("stty -echo")
        await shell.ask("n=1; (while true; do echo $((i++)) >/tick; done) & true")
        machine_of(service).serial_input(b"sleep 1; echo typed b''efore $n\n")
        result = await move(service, target.address, PATIENT)
        await target.arrived()
        assert result.status == "completed"
        shell.service = target.service
        await shell.wait_for(b"typed before 1")
        assert "42" in await shell.ask("echo $((6*7)) $((n+=1))")
        before = await shell.ask("cat /tick; sleep 1")
        assert await shell.ask("cat /tick") != before, "what ran in the background runs on"
        assert not bad_lines(await shell.ask(LOOK))
