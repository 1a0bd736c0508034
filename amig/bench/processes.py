"""The long-lived processes of the losses bench: hosts of sources, hosts of destinations, a device backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from amig.bench import backend, hosts
from amig.children import Child, Place
from amig.errors import HostError

_TIMEOUT = 60.0


class Processes:
    """All three, spoken to by lines."""

    def __init__(self, sources: Child, destinations: Child, device: Child) -> None:
        self._sources, self._destinations, self._device = sources, destinations, device

    @classmethod
    @asynccontextmanager
    async def started(cls, place: Place) -> AsyncIterator[Processes]:
        """Run them for the length of the block."""
        async with (
            Child.started("sources", ["-m", "amig.bench.hosts"], place) as sources,
            Child.started("destinations", ["-m", "amig.bench.hosts"], place) as destinations,
            Child.started("backend", ["-m", "amig.bench.backend"], place) as device,
        ):
            for child in (sources, destinations, device):
                await child.line("ready")
            yield cls(sources, destinations, device)

    async def source(self, command: hosts.Command) -> hosts.Answer:
        """Have a source do something. Raises `HostError`."""
        return await _host(self._sources, command)

    async def destination(self, command: hosts.Command) -> hosts.Answer:
        """Have a destination do something. Raises `HostError`."""
        return await _host(self._destinations, command)

    async def device(self, command: backend.Attach | backend.Report) -> backend.Answer:
        """Have the device backend do something. Raises `HostError`."""
        answer = msgspec.convert(await _ask(self._device, command, "backend"), backend.Answer)
        if answer.error:
            raise HostError(f"the device backend failed: {answer.error}")
        return answer


async def _host(child: Child, command: hosts.Command) -> hosts.Answer:
    answer = msgspec.convert(await _ask(child, command, "answer"), hosts.Answer)
    if answer.error:
        raise HostError(answer.error)
    return answer


async def _ask(child: Child, command: object, key: str) -> dict[str, object]:
    assert child.process.stdin is not None  # noqa: S101 - a pipe
    try:
        child.process.stdin.write(msgspec.json.encode(command) + b"\n")
        await child.process.stdin.drain()
    except (ConnectionError, RuntimeError):  # uvloop's, for a pipe that was closed
        raise HostError(f"the bench's {child.name} has gone") from None
    return await child.line(key, timeout=_TIMEOUT)
