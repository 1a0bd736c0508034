"""Processes that a command starts and speaks JSON lines with, in a place of their own, gone when the command is.

What the demo and the benches have in common: guest hosts, migrators, observers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from amig.errors import HostError

_END_TIMEOUT = 10.0
_TAIL = 2000


class Place:
    """Runtime and state directories of a command's own, so that it never meets another guest of the same name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = os.environ | {
            "XDG_RUNTIME_DIR": str(root / "run"),
            "XDG_STATE_HOME": str(root / "state"),
            "PYTHONUNBUFFERED": "1",
        }
        self.environment.pop("AMIG_READY_FD", None)
        for name in ("run", "state"):
            (root / name).mkdir(mode=0o700)

    @classmethod
    @contextlib.contextmanager
    def temporary(cls, prefix: str = "amig-bench-") -> Any:
        """Yield one that is removed at the end."""
        with TemporaryDirectory(prefix=prefix) as root:
            yield cls(Path(root))

    def socket(self, name: str) -> str:
        """Return the control socket of a host here."""
        return str(self.root / "run" / "amig" / f"{name}.sock")


class Child:
    """A process that speaks JSON lines and ends when its standard input does."""

    def __init__(self, name: str, process: Process, log: Path) -> None:
        self.name = name
        self.process = process
        self._log = log

    @classmethod
    @asynccontextmanager
    async def started(cls, name: str, arguments: Sequence[str], place: Place) -> AsyncIterator[Child]:
        """Run ``python ARGUMENTS`` for the length of the block, and a little longer if it has to be ended."""
        log = place.root / f"{name}.err"
        package = Path(__file__).parent.parent
        safe = [] if package == Path.cwd() else ["-P"]
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *safe,
                *arguments,
                stdin=PIPE,
                stdout=PIPE,
                stderr=errors,
                env=place.environment,
                start_new_session=True,  # Ctrl-C is for us; we end them in order
                limit=1 << 20,
            )
        child = cls(name, process, log)
        try:
            yield child
        finally:
            await child.end()

    async def line(self, key: str, *, timeout: float = 60.0) -> dict[str, Any]:
        """Return the next line that has ``key``. Raises `HostError` with its last words when it ends before."""
        assert self.process.stdout is not None  # noqa: S101 - a pipe
        try:
            async with asyncio.timeout(timeout):
                while text := await self.process.stdout.readline():
                    value = msgspec.json.decode(text, type=dict[str, Any])
                    if key in value:
                        return value
        except TimeoutError:
            raise HostError(f"the {self.name} did not get so far in {timeout:g} s: {self._tail()}") from None
        await self.process.wait()
        raise HostError(f"the {self.name} ended early (code {self.process.returncode}): {self._tail()}")

    def _tail(self) -> str:
        return self._log.read_bytes()[-_TAIL:].decode(errors="replace").strip() or "it said nothing"

    async def ended(self) -> int:
        """Wait for its end by itself and return its code. Raises `HostError` after some time."""
        try:
            async with asyncio.timeout(_END_TIMEOUT):
                return await self.process.wait()
        except TimeoutError:
            raise HostError(f"the {self.name} does not end: {self._tail()}") from None

    async def end(self) -> None:
        """End it: by closing its input, then by signals. Waits for it even when cancelled."""
        waiting = asyncio.ensure_future(self._end())
        cancelled = False
        while not waiting.done():
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError:
                cancelled = True
        waiting.result()
        if cancelled:
            raise asyncio.CancelledError

    async def _end(self) -> None:
        process = self.process
        if process.stdin is not None:
            process.stdin.close()
        for act in (process.terminate, process.kill, lambda: None):
            try:
                async with asyncio.timeout(_END_TIMEOUT):
                    # Not wait() alone: a full pipe would keep it from ending.
                    assert process.stdout is not None  # noqa: S101 - a pipe
                    while await process.stdout.read(1 << 16):
                        pass
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    act()
            else:
                return
