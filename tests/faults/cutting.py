"""A relay that counts what passes and cuts all connections at byte counts that it is given."""

from __future__ import annotations

import asyncio
import contextlib
import random

PIECE = 1 << 16


class CuttingRelay:
    """Listens on loopback and passes on to ``target`` (host, port). An async context manager."""

    def __init__(self, target: tuple[str, int], cuts: list[int] | None = None) -> None:
        """``cuts``: bytes that have passed from source to destination when all connections are reset, ascending."""
        self.target = target
        self.cuts = list(cuts or [])
        self.passed = 0
        """Bytes from source to destination, all connections together."""
        self.made = 0
        """Cuts so far."""
        self._ends: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> CuttingRelay:
        self._server = await asyncio.start_server(self._come, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        for end in self._ends:
            end.transport.abort()

    async def _come(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            there, out = await asyncio.open_connection(*self.target)
            self._ends |= {writer, out}
            await asyncio.gather(self._pump(reader, out, count=True), self._pump(there, writer), return_exceptions=True)
            for end in (writer, out):
                self._ends.discard(end)
                end.transport.abort()
                with contextlib.suppress(OSError):
                    await end.wait_closed()
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, count: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE):
                writer.write(data)
                await writer.drain()
                if count:
                    self.passed += len(data)
                    if self.cuts and self.passed >= self.cuts[0]:
                        self.cuts.pop(0)
                        self.made += 1
                        self.cut()
            if not writer.is_closing():
                writer.write_eof()


def random_cuts(seed: int, count: int, most: int) -> list[int]:
    """Return byte counts below ``most`` at which to cut."""
    dice = random.Random(seed)
    return sorted(dice.randrange(most) for _ in range(count))
