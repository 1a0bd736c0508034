"""A device backend as a process of its own, which logs as vhost-user does: ``python -m amig.bench.backend``.

Writes pages that are its own, each with a generation (every word is ``generation << 32 | page``), and pages of the
checking guest's working set, which the guest writes, too: there it puts what stands in the first word anyway, the
page's number. Each such write is counted in a shared file, before and after, so that the bench knows of it.

Commands come as JSON lines, answered by one each: ``attach`` a guest, and ``report`` what was written to it.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import random
import sys

import msgspec
import numpy as np

from amig.cli import say
from amig.control import replies as rp
from amig.control import requests as rq
from amig.control import types
from amig.control.fdpass import close_all
from amig.control.link import Link
from amig.dirty import atomic
from amig.errors import AmigError, ControlError
from amig.memory import PAGE_SIZE

BURST = 8
"""Pages of either kind that are written at a time."""
PAUSE = 1e-3
"""Seconds between two bursts."""


class Attach(msgspec.Struct, frozen=True, kw_only=True, tag_field="do", tag="attach"):
    """Serve a guest."""

    socket: str
    counters: str
    """File of one u64 for each page of the working set."""
    own_first: int
    own_pages: int
    """Guest-physical pages."""
    ws_first: int
    ws_pages: int


class Report(msgspec.Struct, frozen=True, kw_only=True, tag_field="do", tag="report"):
    """Say what was written, and let go of the guest."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a command."""

    backend: str
    error: str = ""
    generations: tuple[int, ...] = ()
    """Of its own pages."""
    touched: int = 0
    """Writes to the working set."""


class Device:
    """One guest served."""

    def __init__(self, link: Link, attached: rp.VhostIsAttached, fds: list[int], wish: Attach) -> None:
        self._link = link
        self._wish = wish
        self._random = random.Random(1)  # noqa: S311 - not for secrets
        self._or = ctypes.CDLL("libatomic.so.1")["__atomic_fetch_or_1"]  # as an attribute the name would be mangled
        self._or.argtypes = (ctypes.c_void_p, ctypes.c_uint8, ctypes.c_int)
        self.generations = [0] * wish.own_pages
        self.touched = 0
        self.failure: AmigError | None = None
        self._running = attached.running
        self._stop = 0
        self._news = asyncio.Event()
        memory = attached.memory.memory_map()
        maps = {r.id: mmap.mmap(fd, r.size) for r, fd in zip(memory.regions, fds, strict=False)}
        log = np.frombuffer(mmap.mmap(fds[-1], attached.log_bytes), np.uint8)
        self._log = log
        with open(wish.counters, "r+b") as counters:
            self._counts = np.frombuffer(mmap.mmap(counters.fileno(), 0), np.uint64)

        def part(first: int, pages: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
            slot = next(s for s in memory.slots if s.guest_phys <= first * PAGE_SIZE < s.guest_phys + s.size)
            start = (first * PAGE_SIZE - slot.guest_phys + slot.offset) // 8
            words: np.ndarray[tuple[int, ...], np.dtype[np.uint64]] = np.frombuffer(maps[slot.region], np.uint64)
            return words[start : start + 512 * pages].reshape(pages, 512)

        self._own, self._ws = part(wish.own_first, wish.own_pages), part(wish.ws_first, wish.ws_pages)
        link.on_notice = self._notice

    def _notice(self, notice: types.Notice) -> None:
        if isinstance(notice, rp.VhostStop):
            self._running, self._stop = False, notice.number
        elif isinstance(notice, rp.VhostRun):
            self._running, self._stop = True, 0
        self._news.set()

    async def serve(self) -> None:
        """Write and log, resting when told to, until the host goes; what then was wrong is in ``failure``."""
        try:
            while True:
                if self._stop:
                    number, self._stop = self._stop, 0
                    await self._link.ask(rq.VhostStopped(number=number))
                if self._running:
                    self._burst()
                    await asyncio.sleep(PAUSE)
                else:
                    self._news.clear()
                    async with asyncio.timeout(1.0):
                        await self._news.wait()
        except TimeoutError:
            pass  # paused for good: the guest has moved
        except AmigError as error:
            if not (isinstance(error, ControlError) and error.code == "closed"):
                self.failure = error

    def _burst(self) -> None:
        wish = self._wish
        for page in self._random.sample(range(wish.own_pages), min(BURST, wish.own_pages)):
            self.generations[page] += 1
            self._own[page] = self.generations[page] << 32 | page
            self._mark(wish.own_first + page)
        for page in self._random.sample(range(wish.ws_pages), min(BURST, wish.ws_pages)):
            self._counts[page] += np.uint64(1)
            self._ws[page, 0] = page
            self._mark(wish.ws_first + page)
            self._counts[page] += np.uint64(1)
            self.touched += 1

    def _mark(self, gpa_page: int) -> None:
        self._or(self._log.ctypes.data + gpa_page // 8, 1 << gpa_page % 8, 5)


async def attach(wish: Attach) -> tuple[Link, Device]:
    """Connect to a host as a backend. Raises `AmigError`."""
    atomic.require()
    link = await Link.connect(wish.socket)
    try:
        _, fds = await link.hello(client="bench backend")
        close_all(fds)
        attached, fds = await link.request(rq.VhostAttach(), rp.VhostIsAttached, limit=types.MAX_HELLO_FRAME)
        try:
            return link, Device(link, attached, fds, wish)
        finally:
            for fd in fds:
                os.close(fd)
    except BaseException:
        link.close()
        raise


async def _main() -> None:
    loop = asyncio.get_running_loop()
    decoder = msgspec.json.Decoder(Attach | Report)
    serving: tuple[Link, Device, asyncio.Task[None]] | None = None
    say.json_line({"ready": "backend"})

    async def leave() -> Answer:
        nonlocal serving
        if serving is None:
            return Answer(backend="report", error="nothing is attached")
        link, device, task = serving
        serving = None
        task.cancel()
        await asyncio.wait([task])
        link.close()
        text = str(device.failure) if device.failure else ""
        return Answer(backend="report", error=text, generations=tuple(device.generations), touched=device.touched)

    while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
        wish = decoder.decode(line)
        if isinstance(wish, Report):
            say.json_line(await leave())
            continue
        try:
            link, device = await attach(wish)
        except AmigError as error:
            say.json_line(Answer(backend="attach", error=str(error)))
            continue
        serving = (link, device, asyncio.create_task(device.serve()))
        say.json_line(Answer(backend="attach"))
    if serving is not None:
        await leave()


def main() -> None:
    """Run it."""
    from amig.cli.loop import run

    run(_main())


if __name__ == "__main__":
    main()
