"""What the loopback carries beside the same guest: iperf3."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
from asyncio.subprocess import DEVNULL, PIPE, Process
from typing import Any

PROGRAM = "iperf3"
HOW_TO_GET_IT = f"there is no {PROGRAM} here; on Debian: apt-get install iperf3"


async def carry(size: int, streams: int, link: int | None = None) -> float:
    """Return the seconds that ``size`` bytes take over so many connections. Raises `RuntimeError`."""
    if shutil.which(PROGRAM) is None:
        raise RuntimeError(HOW_TO_GET_IT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server = await asyncio.create_subprocess_exec(
        PROGRAM, "-s", "-1", "-p", port, "-B", "127.0.0.1", stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL
    )
    try:
        words = ["-c", "127.0.0.1", "-p", port, "-P", str(streams), "-n", str(size // streams), "-J"]
        if link is not None:
            words += ["-b", str(8 * link // streams)]
        for _ in range(50):  # until the server listens
            client = await asyncio.create_subprocess_exec(PROGRAM, *words, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
            try:
                out, _errors = await client.communicate()
            finally:
                await _end(client)
            told: dict[str, Any] = json.loads(out or b"{}")
            if "error" not in told:
                return size * 8 / float(told["end"]["sum_received"]["bits_per_second"])
            if "refused" not in told["error"]:
                break
            await asyncio.sleep(0.05)
        raise RuntimeError(f"iperf3 failed: {told.get('error')}")
    finally:
        await _end(server)


async def _end(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.communicate()
