"""A small QMP client: JSON lines over QEMU's monitor socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

_CONNECT_TIMEOUT = 30.0
_ANSWER_TIMEOUT = 60.0
_MAX_LINE = 1 << 20
_MAX_EVENTS = 1000


class QmpError(Exception):
    """QEMU refused a command, or has gone."""


class Qmp:
    """One monitor connection; events are kept until somebody asks for them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.events: list[dict[str, Any]] = []

    @classmethod
    async def connect(cls, path: str) -> Qmp:
        """Connect, waiting for the socket to appear, and leave negotiation mode. Raises `QmpError`."""
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                while True:
                    try:
                        reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_LINE)
                        break
                    except OSError:
                        await asyncio.sleep(0.01)
                client = cls(reader, writer)
                await client._read()  # the greeting
                await client.run("qmp_capabilities")
        except TimeoutError:
            raise QmpError(f"QEMU's monitor did not answer in {_CONNECT_TIMEOUT:g} s") from None
        return client

    async def run(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its answer; underscores of argument names stand for hyphens. Raises `QmpError`."""
        said: dict[str, Any] = {"execute": command}
        if arguments:
            said["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._writer.write(json.dumps(said).encode() + b"\n")
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                await self._writer.drain()
                while True:
                    answer = await self._read()
                    if "return" in answer:
                        return answer["return"]
                    if "error" in answer:
                        raise QmpError(f"{command}: {answer['error'].get('desc', answer['error'])}")
        except TimeoutError:
            raise QmpError(f"{command}: no answer in {_ANSWER_TIMEOUT:g} s") from None
        except ConnectionError as error:
            raise QmpError(f"{command}: {error}") from None

    async def event(self, name: str, **data: Any) -> dict[str, Any]:
        """Return the next event of that name whose data holds ``data``; waits without limit. Raises `QmpError`."""
        while True:
            for at, event in enumerate(self.events):
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    del self.events[: at + 1]
                    return event
            await self._read()

    async def _read(self) -> dict[str, Any]:
        line = await self._reader.readline()
        if not line:
            raise QmpError("QEMU has gone")
        value: dict[str, Any] = json.loads(line)
        if "event" in value:
            self.events = [*self.events[-_MAX_EVENTS:], value]
        return value

    def close(self) -> None:
        """Hang up."""
        self._writer.close()
