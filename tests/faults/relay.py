"""A relay between source and destination that understands frames, and does to the connection what a case says.

It follows both sides' states from the frames that pass, so that a fault can be placed at "the frame that this side
sends in this state".
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable

from amig.wire.frames import HEADER_SIZE, decode_header
from amig.wire.frametype import FrameType
from amig.wire.states import DestinationProtocol, Event, Protocol, SourceProtocol, Way
from tests.faults.cases import Action, Case, Position, Send

STALL = 0.15
"""Seconds."""
Hook = Callable[[], Awaitable[None]]


class _Gone(Exception):
    """The connection is not to be used any more."""


def _step(protocol: Protocol, way: Way, kind: FrameType) -> None:  # type: ignore[type-arg]
    """Follow a frame; one that crossed another stays where it is."""
    protocol._state = protocol._table[protocol._state].get(Event(way, kind), protocol._state)


class _Link:
    """One connection through the relay."""

    def __init__(self, relay: Relay, ends: dict[str, tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
        self._relay = relay
        self._ends = ends
        self.states: dict[str, Protocol] = {"source": SourceProtocol(), "destination": DestinationProtocol()}  # type: ignore[type-arg]
        self._silent = False
        self._deaf: set[str] = set()

    async def run(self) -> None:
        pumps = [
            asyncio.ensure_future(self._pump(*way)) for way in (("source", "destination"), ("destination", "source"))
        ]
        try:
            await asyncio.gather(*pumps)
        except (_Gone, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            for pump in pumps:
                pump.cancel()
            self.end()  # before anything is waited for: we may be cancelled a second time
            await asyncio.gather(*pumps, return_exceptions=True)

    def end(self, *, reset: bool = False) -> None:
        for _, writer in self._ends.values():
            if reset:
                sock = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                writer.close()

    async def _pump(self, sender: str, receiver: str) -> None:
        reader, writer = self._ends[sender][0], self._ends[receiver][1]
        while True:
            try:
                head = await reader.readexactly(HEADER_SIZE)
                header = decode_header(head)
                data = head + await reader.readexactly(header.length)
            except asyncio.IncompleteReadError as error:
                await self._pass(writer, error.partial, receiver)
                if not self._silent:
                    with contextlib.suppress(OSError):
                        writer.write_eof()
                return
            await self._frame(header.type, data, sender, receiver, writer)

    async def _frame(
        self, kind: FrameType, data: bytes, sender: str, receiver: str, writer: asyncio.StreamWriter
    ) -> None:
        send = Send(sender, self.states[sender].state, kind)
        _step(self.states[sender], Way.SEND, kind)
        case = await self._relay.seen(send)
        if case is None:
            await self._pass(writer, data, receiver)
            await self._relay.passed(send)
        else:
            at = {Position.BEFORE: 0, Position.HEADER: 8, Position.PAYLOAD: (HEADER_SIZE + len(data) + 1) // 2}
            cut = at.get(case.position, len(data))
            await self._pass(writer, data[:cut], receiver)
            if cut == len(data):
                self._arrived(receiver, kind)
            await self._fault(case, writer, receiver)
            if cut == len(data):
                return
            await self._pass(writer, data[cut:], receiver)
        self._arrived(receiver, kind)

    def _arrived(self, receiver: str, kind: FrameType) -> None:
        if not self._silent and receiver not in self._deaf:
            _step(self.states[receiver], Way.RECEIVE, kind)

    async def _pass(self, writer: asyncio.StreamWriter, data: bytes, receiver: str) -> None:
        if data and not self._silent and receiver not in self._deaf:
            writer.write(data)
            await writer.drain()

    async def _fault(self, case: Case, writer: asyncio.StreamWriter, receiver: str) -> None:
        match case.action:
            case Action.CUT | Action.RESET:
                if case.action is Action.RESET:
                    self.end(reset=True)
                raise _Gone
            case Action.HALF:
                writer.write_eof()
                self._deaf.add(receiver)
            case Action.STALL:
                await asyncio.sleep(STALL)
            case Action.SILENCE:
                self._silent = True


class Relay:
    """Listens on loopback and passes on to ``target`` (host, port). An async context manager."""

    def __init__(self, target: tuple[str, int], *faults: Case) -> None:
        self.target = target
        self.log: list[Send] = []
        self.news = asyncio.Event()
        self.fired: list[Case] = []
        self._faults = list(faults)
        self._counts = [0] * len(faults)
        self._hooks: dict[Send, Hook] = {}
        self._hooks_after: dict[Send, Hook] = {}
        self.links: list[_Link] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def on(self, send: Send, hook: Hook, *, after: bool = False) -> None:
        """Await ``hook`` before (or after) the first such frame is passed on; the other direction goes on meanwhile."""
        (self._hooks_after if after else self._hooks)[send] = hook

    async def passed(self, send: Send) -> None:
        """A frame has been passed on."""
        hook = self._hooks_after.pop(send, None)
        if hook is not None:
            await hook()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._come, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self.drop()
        await self._server.wait_closed()

    async def drop(self) -> None:
        """End every connection: also those that were silent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def saw(self, send: Send, timeout: float = 0.5) -> bool:
        """Wait until such a frame has come by."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while send not in self.log:
                    self.news.clear()
                    await self.news.wait()
        return send in self.log

    async def seen(self, send: Send) -> Case | None:
        """Note a frame; returns the fault to do to it."""
        self.log.append(send)
        self.news.set()
        hook = self._hooks.pop(send, None)
        if hook is not None:
            await hook()
        for index, case in enumerate(self._faults):
            if case.send == send and case not in self.fired:
                self._counts[index] += 1
                if self._counts[index] > case.nth:
                    self.fired.append(case)
                    self.news.set()
                    return case
        return None

    async def _come(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            try:
                there = await asyncio.open_connection(*self.target)
            except OSError:
                writer.transport.abort()
                return
            link = _Link(self, {"source": (reader, writer), "destination": there})
            self.links.append(link)
            try:
                await link.run()
            finally:
                self.links.remove(link)
                for end in (writer, there[1]):
                    with contextlib.suppress(Exception):
                        await end.wait_closed()
        except asyncio.CancelledError:
            pass
        finally:
            self._tasks.discard(task)
