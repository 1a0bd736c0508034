"""QEMU's side: the same image, a shared memory backend, QMP."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from amig.host.images import image_path
from amig.memory import PAGE_SIZE
from tests.bench.qmp import Qmp, QmpError
from tests.bench.scenarios import Mode, Scenario

PROGRAM = "qemu-system-x86_64"
HOW_TO_GET_IT = f"there is no {PROGRAM} here; on Debian: apt-get install qemu-system-x86"
UNLIMITED = 10**12
"""Bytes a second: QEMU's own default is 128 MiB/s, and 0 is not unlimited everywhere."""


def arguments(scenario: Scenario, *, monitor: Path, preallocated: bool, incoming: bool) -> list[str]:
    """Return the command line of one QEMU."""
    # Should the bench be killed, its QEMUs must not stay.
    tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    prealloc = ",prealloc=on" if preallocated else ""
    return [
        *tied, PROGRAM, "-accel", "kvm", "-cpu", "qemu64", "-smp", "1", "-m", f"{scenario.memory >> 20}",
        "-object", f"memory-backend-memfd,id=m,size={scenario.memory},share=on{prealloc}",
        "-machine", "pc,memory-backend=m", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-serial", "null", "-qmp", f"unix:{monitor},server=on,wait=off",
        "-kernel", str(image_path()), "-append", scenario.line,
        *(["-incoming", "defer"] if incoming else []),
    ]  # fmt: skip


class Qemu:
    """One QEMU and its monitor."""

    def __init__(self, process: Process, qmp: Qmp) -> None:
        self.process, self.qmp = process, qmp

    @classmethod
    @asynccontextmanager
    async def started(
        cls, scenario: Scenario, folder: Path, *, preallocated: bool = False, incoming: bool = False
    ) -> AsyncIterator[Qemu]:
        """Run one for the length of the block. Raises `QmpError`."""
        monitor = folder / ("destination.qmp" if incoming else "source.qmp")
        words = arguments(scenario, monitor=monitor, preallocated=preallocated, incoming=incoming)
        process = await asyncio.create_subprocess_exec(*words, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE)
        try:
            connecting = asyncio.ensure_future(Qmp.connect(str(monitor)))
            ending = asyncio.ensure_future(process.wait())
            try:
                await asyncio.wait((connecting, ending), return_when=asyncio.FIRST_COMPLETED)
                if not connecting.done():
                    assert process.stderr is not None
                    raise QmpError(f"QEMU did not start: {(await process.stderr.read())[-2000:].decode().strip()}")
                qmp = connecting.result()
            finally:
                connecting.cancel()
                ending.cancel()
            try:
                yield cls(process, qmp)
            finally:
                qmp.close()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid


def capabilities(mode: Mode) -> dict[str, bool]:
    """Return what has to be switched on at both ends."""
    return {
        "events": True,
        "multifd": mode.multifd,
        "xbzrle": mode.xbzrle,
        "auto-converge": mode.auto_converge,
    }


def parameters(scenario: Scenario, mode: Mode) -> dict[str, Any]:
    """Return the parameters of both ends."""
    found: dict[str, Any] = {
        "max_bandwidth": scenario.link or UNLIMITED,
        "downtime_limit": round(scenario.downtime * 1000),
    }
    if mode.multifd:
        found |= {"multifd_channels": scenario.streams, "multifd_compression": mode.compression}
    if mode.xbzrle:
        found["xbzrle_cache_size"] = scenario.working_set or 1 << 30  # as large as the working set; a power of two
    return found


async def prepare(source: Qemu, destination: Qemu, scenario: Scenario, mode: Mode) -> str:
    """Set both ends up and return the address that the destination listens at. Raises `QmpError`."""
    wanted = [{"capability": name, "state": state} for name, state in capabilities(mode).items()]
    for end in (source, destination):
        await end.qmp.run("migrate-set-capabilities", capabilities=wanted)
        await end.qmp.run("migrate-set-parameters", **parameters(scenario, mode))
    await destination.qmp.run("migrate-incoming", uri="tcp:127.0.0.1:0")
    told = (await destination.qmp.run("query-migrate"))["socket-address"][0]
    return f"tcp:127.0.0.1:{told['port']}"


async def migrate(source: Qemu, address: str) -> float:
    """Give the command; returns when (CLOCK_MONOTONIC) it was given. Raises `QmpError`."""
    at = time.monotonic()
    await source.qmp.run("migrate", uri=address)
    return at


async def ended(source: Qemu) -> dict[str, Any]:
    """Wait for the source to say how it ended, and return its figures. Raises `QmpError` when it failed."""
    while True:
        status = (await source.qmp.event("MIGRATION"))["data"]["status"]
        if status in ("completed", "failed", "cancelled"):
            break
    info: dict[str, Any] = await source.qmp.run("query-migrate")
    if status != "completed":
        raise QmpError(f"the migration {status}: {info.get('error-desc', 'QEMU gave no reason')}")
    return info


async def so_far(source: Qemu) -> tuple[int, int]:
    """Return the rounds done and the pages left. Raises `QmpError`."""
    ram = (await source.qmp.run("query-migrate")).get("ram", {})
    return ram.get("dirty-sync-count", 0), ram.get("remaining", 0) // PAGE_SIZE


def figures(info: dict[str, Any], run: dict[str, Any]) -> None:
    """Put what ``query-migrate`` tells into the fields of a `Run`."""
    ram = info["ram"]
    xbzrle = info.get("xbzrle-cache", {}).get("pages", 0)
    run.update(
        told_s=info["total-time"] / 1e3,
        told_downtime_ms=float(info["downtime"]),
        pages_sent=ram["normal"] + xbzrle,
        pages_zero=ram["duplicate"],
        bytes_wire=ram["transferred"],
        rounds=ram["dirty-sync-count"],
        throttle=float(info.get("cpu-throttle-percentage", 0)),
    )
