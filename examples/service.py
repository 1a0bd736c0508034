"""A small service that moves guests on request: what embedding amig looks like.

It listens on a unix socket and speaks lines: requests are words, answers are JSON objects. Any number of migrations run
at the same time; what a migration tells goes to the client that asked for it, for as long as it listens.

::

    $ python examples/service.py /run/mover.sock &
    $ nc -U /run/mover.sock
    move web1 tcp://hostb:7000 downtime=50ms bandwidth=500MB/s
    {"id":"4f0c…","event":"state","state":"connecting",…}
    …
    {"id":"4f0c…","event":"result","status":"completed","downtime_ms":12.1,…}

    limit ID bandwidth=100MB/s      changes a migration under way
    cancel ID                       keeps the guest where it is
    list                            what is under way

It uses asyncio's own event loop; under uvloop it works as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import msgspec

import amig
from amig.units import parse_duration, parse_rate, parse_size

OPTIONS: dict[str, Callable[[str], Any]] = {
    "bandwidth": parse_rate,
    "downtime": parse_duration,
    "timeout": parse_duration,
    "chunk": parse_size,
    "streams": int,
    "compression": str,
}
MAX_LINE = 4096


class Mover:
    """The service: ``async with Mover(path): ...``. Leaving it cancels what is under way, and waits for it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._moves: dict[str, amig.Migration] = {}
        self._listening: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Mover:
        self._clients = asyncio.TaskGroup()
        await self._clients.__aenter__()
        # Of the service, not of a client: a client that hangs up does not stop what it has asked for.
        self._under_way = asyncio.TaskGroup()
        await self._under_way.__aenter__()
        self._server = await asyncio.start_unix_server(self._connected, self._path, limit=MAX_LINE)
        os.chmod(self._path, 0o600)
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._server.close()
        for migration in self._moves.values():
            migration.cancel()  # past COMMIT it is refused, and the guest's arrival awaited
        await self._under_way.__aexit__(None, None, None)
        for task in self._listening:
            task.cancel()
        await self._clients.__aexit__(None, None, None)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._clients.create_task(self._serve(reader, Client(writer)))
        self._listening.add(task)
        task.add_done_callback(self._listening.discard)

    async def _serve(self, reader: asyncio.StreamReader, client: Client) -> None:
        try:
            while line := await reader.readline():
                try:
                    await self._obey(line.decode().split(), client)
                except (amig.AmigError, ValueError, KeyError) as error:
                    await client.tell({"event": "error", "text": str(error)})
        except (ConnectionError, ValueError):  # gone, or a line without an end
            pass
        finally:
            client.close()

    async def _obey(self, words: list[str], client: Client) -> None:
        match words:
            case []:
                pass
            case ["move", name, destination, *options]:
                migration = amig.Migration(name, destination, amig.Policy(**_options(options)))
                self._under_way.create_task(self._move(migration, client))
            case ["cancel", id]:
                await client.tell({"id": id, "event": "cancel", "accepted": self._find(id).cancel()})
            case ["limit", id, *options]:
                limits = _options(options)
                if "bandwidth" in limits:
                    self._find(id).set_bandwidth(limits["bandwidth"])
                if "downtime" in limits:
                    self._find(id).set_downtime(limits["downtime"])
                await client.tell({"id": id, "event": "limit"})
            case ["list"]:
                await client.tell({"event": "list", "moves": {id: str(move.state) for id, move in self._moves.items()}})
            case _:
                raise ValueError("move NAME DESTINATION [OPTION=VALUE ...] | cancel ID | limit ID OPTION=VALUE | list")

    async def _move(self, migration: amig.Migration, client: Client) -> None:
        """Run one migration. Its failure is its own: it is told, and the service goes on."""
        self._moves[migration.id] = migration
        try:
            with contextlib.suppress(amig.AmigError):  # the result tells
                async with migration:
                    async for event in migration:
                        await client.tell({"id": migration.id} | msgspec.to_builtins(event))
        finally:
            del self._moves[migration.id]
        await client.tell({"id": migration.id} | msgspec.to_builtins(await migration.result()))

    def _find(self, id: str) -> amig.Migration:
        try:
            return self._moves[id]
        except KeyError:
            raise ValueError(f"no migration {id} is under way") from None


class Client:
    """Where answers go; one that has gone, or does not read, holds nobody up."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def tell(self, value: dict[str, Any]) -> None:
        """Send one JSON object as a line, unless the client is gone or has a megabyte still to read."""
        transport = self._writer.transport
        if not transport.is_closing() and transport.get_write_buffer_size() < 1 << 20:
            self._writer.write(msgspec.json.encode(value) + b"\n")

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


def _options(words: list[str]) -> dict[str, Any]:
    found = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in OPTIONS:
            raise ValueError(f"{key!r} is none of {', '.join(OPTIONS)}")
        found[key] = OPTIONS[key](value)
    return found


async def main(path: str) -> None:
    """Serve until SIGINT or SIGTERM."""
    end = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    async with Mover(path):
        await end.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
