"""What an operator asks of a host: status, pause, resume, stop, cancel, resolve, console."""

from __future__ import annotations

import asyncio
import os
from collections import deque

from amig.control import replies as rp
from amig.control import requests as rq
from amig.control import types
from amig.control.fdpass import close_all
from amig.control.link import DEFAULT_TIMEOUT, Link
from amig.errors import ControlError
from amig.guest import Outcome

MAX_UNREAD = 1 << 20
"""Bytes of console output kept for a slow reader before the host is left to wait."""


class ControlClient:
    """A connection to a host, for commands. An async context manager; every method raises `ControlError`."""

    def __init__(self, link: Link, hello: rp.HelloOk) -> None:
        self._link = link
        self.hello = hello
        """Who the host said it is."""
        self._gone = asyncio.get_running_loop().create_future()
        link.on_broken = self._broken

    @classmethod
    async def connect(
        cls, path: str | os.PathLike[str], *, client: str = "amig", timeout: float = DEFAULT_TIMEOUT
    ) -> ControlClient:
        """Connect to the host that listens at ``path``; raises `NoSuchGuest` when none does."""
        link = await Link.connect(path, timeout=timeout)
        try:
            hello, fds = await link.hello(client=client)
            close_all(fds)
        except BaseException:
            link.close()
            raise
        return cls(link, hello)

    async def __aenter__(self) -> ControlClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def status(self) -> rp.StatusIs:
        """Return everything there is to know of the host and its guest."""
        reply, fds = await self._link.request(rq.Status(), rp.StatusIs, limit=types.MAX_HELLO_FRAME)
        close_all(fds)
        return reply

    async def pause(self) -> None:
        """Pause the guest until an operator resumes it."""
        await self._link.ask(rq.OperatorPause())

    async def resume(self) -> None:
        """Undo `pause`."""
        await self._link.ask(rq.OperatorResume())

    async def stop(self, *, force: bool = False) -> None:
        """Stop guest and host; `gone` tells when the host has. Refused with ``in-doubt`` after COMMIT unless forced."""
        await self._link.ask(rq.Stop(force=force))

    async def cancel(self) -> None:
        """Ask the migrator of the guest to cancel; refused with ``no-migration`` or ``too-late``."""
        await self._link.ask(rq.Cancel())

    async def release(self, migration: str, outcome: Outcome) -> None:
        """Say how a committed handover ended; its id is ``status.in_doubt.migration``."""
        await self._link.ask(rq.Release(migration=migration, outcome=outcome))

    async def ask_guest(self, what: rq.GuestWord) -> int:
        """Ask amig's own guest image for something; returns the number that it will answer with in ``status.guest``.

        Refused with ``wrong-state`` unless the guest runs, ``guest`` when it is another one.
        """
        reply, fds = await self._link.request(rq.GuestAsk(what=what), rp.GuestAsked)
        close_all(fds)
        return reply.number

    async def console(self, *, replay: bool = True) -> Console:
        """Attach to the guest's serial port; one stream a connection."""
        console = Console(self._link)
        await self._link.ask(rq.ConsoleAttach(replay=replay))
        return console

    async def gone(self) -> None:
        """Wait until the host has closed the connection, which it does last."""
        await asyncio.shield(self._gone)

    def _broken(self, _: ControlError) -> None:
        if not self._gone.done():
            self._gone.set_result(None)
        if isinstance(self._link.on_notice, Console):
            self._link.on_notice.end()

    def close(self) -> None:
        """Hang up; idempotent."""
        self._link.close()


class Console:
    """A guest's serial port. Made by `ControlClient.console`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._unread: deque[bytes] = deque()
        self._size = 0
        self._news = asyncio.Event()
        self._ended = False
        self.dropped = 0
        """Bytes of output that the host could not keep for us."""
        self.guest_ended: rp.GuestEnded | None = None
        """Why the host is about to go, once it has said so."""
        link.on_notice = self

    def __call__(self, notice: types.Notice) -> None:
        """Take a notice from the link."""
        if isinstance(notice, rp.ConsoleOutput):
            self.dropped += notice.dropped
            self._unread.append(notice.data)
            self._size += len(notice.data)
            self._news.set()
            if self._size > MAX_UNREAD:
                self._link.pause_reading()
        elif isinstance(notice, rp.GuestEnded):
            self.guest_ended = notice

    async def read(self) -> bytes:
        """Return what the guest has written, at least one byte, or ``b""`` when the host has gone."""
        while not self._unread and not self._ended:
            self._news.clear()
            await self._news.wait()
        data = b"".join(self._unread)
        self._unread.clear()
        self._size = 0
        self._link.resume_reading()
        return data

    async def write(self, data: bytes) -> None:
        """Feed the guest; returns once the serial port has it."""
        for start in range(0, len(data), types.MAX_CONSOLE_BYTES):
            await self._link.ask(rq.ConsoleInput(data=data[start : start + types.MAX_CONSOLE_BYTES]))

    def end(self) -> None:
        """Let readers see the end."""
        self._ended = True
        self._news.set()
