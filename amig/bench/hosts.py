"""Hosts of small guests, many one after the other in one process: ``python -m amig.bench.hosts``.

Commands come as JSON lines and are answered by one line each; the end of standard input ends everything. The process
is started once and not for each of hundreds of guests, because a migration of the bench takes less time than that.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack

import msgspec

from amig.cli import say
from amig.errors import AmigError, UsageError
from amig.host.boot import BootConfig
from amig.host.images import image_path
from amig.host.kvm_machine import KvmMachine, MachineConfig
from amig.host.service import HostService
from amig.session.reception import Reception

_WORDS = 4


class HostGuest(msgspec.Struct, frozen=True, kw_only=True, tag_field="do", tag="host"):
    """Boot a guest of amig's own image."""

    name: str
    memory: int
    append: str
    vcpus: int = 1
    initially_set: bool = True
    dirty_ring: int = 0


class Receive(msgspec.Struct, frozen=True, kw_only=True, tag_field="do", tag="receive"):
    """Wait for a guest; ``memory`` bytes are prepared for it."""

    name: str
    memory: int = 0
    dirty_ring: int = 0


class End(msgspec.Struct, frozen=True, kw_only=True, tag_field="do", tag="end"):
    """End a host, and tell what its guest has said about its memory."""

    name: str


Command = HostGuest | Receive | End


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a command."""

    answer: str
    """The name that the command had."""
    error: str = ""
    socket: str = ""
    address: str = ""
    words: tuple[str, ...] = ()
    """The guest's own, where it found its memory damaged."""


class Serial:
    """What a guest has written to its serial port, its last 64 KiB."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __call__(self, data: bytes) -> None:
        """Take more."""
        self._data += data
        del self._data[:-65536]

    def mismatches(self) -> tuple[str, ...]:
        """Return the lines in which a guest complains, the first of them."""
        lines = self._data.decode(errors="replace").splitlines()
        return tuple(line.strip() for line in lines if "MISMATCH" in line)[:_WORDS]


class Hosts:
    """All that this process hosts, by name."""

    def __init__(self) -> None:
        self._stacks: dict[str, AsyncExitStack] = {}
        self._serial: dict[str, Serial] = {}

    async def do(self, command: Command) -> Answer:
        """Carry out a command."""
        try:
            match command:
                case HostGuest():
                    return await self._host(command)
                case Receive():
                    return await self._receive(command)
                case End():
                    return await self._end(command.name)
        except AmigError as error:
            return Answer(answer=command.name, error=str(error) or type(error).__name__)

    async def _host(self, command: HostGuest) -> Answer:
        stack, serial = self._make(command.name)
        service = await stack.enter_async_context(HostService(command.name, sinks=(serial,)))
        config = MachineConfig(
            memory=command.memory,
            vcpus=command.vcpus,
            initially_set=command.initially_set,
            dirty_ring=command.dirty_ring,
        )
        boot = BootConfig(kernel=image_path(), append=command.append)
        machine = await service.build(KvmMachine.boot, config, boot, sink=service.console.write)
        await service.start(machine)
        return Answer(answer=command.name, socket=str(service.socket_path))

    async def _receive(self, command: Receive) -> Answer:
        stack, serial = self._make(command.name)
        reception = Reception(
            "tcp://127.0.0.1:0",
            name=command.name,
            sinks=(serial,),
            memory=command.memory,
            dirty_ring=command.dirty_ring,
        )
        await stack.enter_async_context(reception)
        return Answer(answer=command.name, socket=str(reception.service.socket_path), address=reception.address)

    def _make(self, name: str) -> tuple[AsyncExitStack, Serial]:
        if name in self._stacks:
            raise UsageError(f"{name} is hosted here already")
        self._stacks[name], self._serial[name] = AsyncExitStack(), Serial()
        return self._stacks[name], self._serial[name]

    async def _end(self, name: str) -> Answer:
        stack, serial = self._stacks.pop(name, None), self._serial.pop(name, None)
        if stack is None or serial is None:
            raise UsageError(f"{name} is not hosted here")
        await stack.aclose()
        return Answer(answer=name, words=serial.mismatches())

    async def close(self) -> None:
        """End all."""
        for name in tuple(self._stacks):
            await self._end(name)


async def _main() -> None:
    loop = asyncio.get_running_loop()
    hosts = Hosts()
    decoder = msgspec.json.Decoder(Command)
    say.json_line({"ready": "hosts"})
    try:
        while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
            say.json_line(await hosts.do(decoder.decode(line)))
    finally:
        await hosts.close()


def main() -> None:
    """Run it."""
    from amig.cli.loop import run

    say.set_up_logging(debug=False)
    run(_main())


if __name__ == "__main__":
    main()
