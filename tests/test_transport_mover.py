"""Many pages at once are moved by a thread: the event loop goes on, and no thread is left in memory or on a file."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
import uvloop

from amig.errors import LinkLost
from amig.memory import PAGE_SIZE
from amig.pieces import Pieces
from amig.transport import mover
from amig.transport.mover import WORTH_BYTES, Mover
from amig.transport.sock import SocketConnection
from amig.transport.vectors import Transfer

PAGES = 4 * WORTH_BYTES // PAGE_SIZE
Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a coroutine on a loop of its own, of either kind; afterwards nothing of it may be left."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.get_loop()  # a loop of the kind, and uvloop the first time more than that
    gc.collect()
    before = descriptors()
    with asyncio.Runner(loop_factory=factory) as runner:
        yield runner.run
    gc.collect()
    for thread in movers():
        thread.join(5)
    assert not movers()
    assert descriptors() == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def movers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("amig-move")]


@contextlib.asynccontextmanager
async def pair(
    family: socket.AddressFamily = socket.AF_INET,
) -> AsyncIterator[tuple[SocketConnection, SocketConnection]]:
    """Two connected ends, whose kernel holds little: what moves 4 MiB has to wait for the other side."""
    if family == socket.AF_INET:
        with socket.create_server(("127.0.0.1", 0)) as server:
            one = socket.create_connection(server.getsockname())
            other, _ = server.accept()
    else:
        one, other = socket.socketpair(family)
    for end in (one, other):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    near, far = SocketConnection(one, "far"), SocketConnection(other, "near")
    try:
        yield near, far
    finally:
        near.abort()
        far.abort()


def scattered() -> Pieces:
    """Every second page of some memory that holds something."""
    memory = np.random.default_rng(1).integers(0, 255, (2 * PAGES, PAGE_SIZE), np.uint8)
    return Pieces(memory, np.arange(0, 2 * PAGES, 2, dtype=np.int64))


def empty() -> Pieces:
    return Pieces(np.zeros((PAGES, PAGE_SIZE), np.uint8), np.arange(PAGES, dtype=np.int64))


async def under_way(end: SocketConnection, task: asyncio.Task[None]) -> None:
    """Wait until a part has gone and the rest finds no room."""
    async with asyncio.timeout(10):
        last = -1
        while not end.bytes_sent or end.bytes_sent != last:
            last = end.bytes_sent
            await asyncio.sleep(0.05)
    assert not task.done()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_pages_arrive_as_they_lie_and_not_by_the_loops_thread(
    run: Run, family: socket.AddressFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    who: set[str] = set()
    read, write = Transfer.read, Transfer.write

    def reading(self: Transfer, fd: int) -> int:
        who.add(threading.current_thread().name)
        return read(self, fd)

    def writing(self: Transfer, fd: int) -> int:
        who.add(threading.current_thread().name)
        return write(self, fd)

    monkeypatch.setattr(Transfer, "read", reading)
    monkeypatch.setattr(Transfer, "write", writing)

    async def main() -> None:
        async with pair(family) as (near, far):
            for _ in range(2):
                sent, came = scattered(), empty()
                head = bytearray(4)
                async with asyncio.TaskGroup() as group:
                    group.create_task(near.send_pieces(b"head", sent))
                    await far.recv_into(head)
                    group.create_task(far.recv_pieces(came))
                assert head == b"head"
                assert (came.memory == sent.memory[::2]).all()
            assert near.bytes_sent == far.bytes_received == 2 * (4 + PAGES * PAGE_SIZE)
            assert len(movers()) == 2  # one for each way, however much goes

    run(main())
    assert who == {"amig-move"}


def test_few_pages_are_not_worth_a_thread(run: Run) -> None:
    async def main() -> None:
        async with pair(socket.AF_UNIX) as (near, far):
            few = Pieces(np.ones((8, PAGE_SIZE), np.uint8), np.arange(8, dtype=np.int64))
            came = Pieces(np.zeros((8, PAGE_SIZE), np.uint8), np.arange(8, dtype=np.int64))
            await asyncio.gather(near.send_pieces(b"", few), far.recv_pieces(came))
            assert came.memory.all()
            assert not movers()

    run(main())


def test_the_thread_has_left_the_memory_when_a_cancelled_send_returns(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = threading.Event()
    leave = threading.Event()
    write = Transfer.write

    def slow(self: Transfer, fd: int) -> int:
        inside.set()
        leave.wait(10)
        return write(self, fd)

    monkeypatch.setattr(Transfer, "write", slow)

    async def main() -> None:
        async with pair() as (near, _):
            sending = asyncio.create_task(near.send_pieces(b"", scattered()))
            await asyncio.to_thread(inside.wait, 10)
            sending.cancel()
            await asyncio.sleep(0.05)
            sending.cancel()
            await asyncio.sleep(0.05)
            assert not sending.done()  # the kernel may still be reading
            leave.set()
            with pytest.raises(asyncio.CancelledError):
                await sending
            calls = near.bytes_sent
            await asyncio.sleep(0.05)
            assert near.bytes_sent == calls  # and there was no further call
            with pytest.raises(LinkLost, match="a message to it was cut off"):
                await near.send(b"x")

    run(main())


def test_cancelled_while_it_waits_for_room_it_stops_and_what_the_peer_said_can_be_read(run: Run) -> None:
    async def main() -> None:
        async with pair() as (near, far):
            sending = asyncio.create_task(near.send_pieces(b"", scattered()))
            await under_way(near, sending)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            with pytest.raises(LinkLost, match="a message to it was cut off"):
                await near.send_pieces(b"", scattered())
            await far.send(b"why")
            why = bytearray(3)
            await near.recv_into(why)
            assert why == b"why"

    run(main())


def test_a_receive_cancelled_before_its_first_byte_does_no_harm(run: Run) -> None:
    async def main() -> None:
        async with pair() as (near, far):
            receiving = asyncio.create_task(far.recv_pieces(empty()))
            await asyncio.sleep(0.05)
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiving
            sent, came = scattered(), empty()
            await asyncio.gather(near.send_pieces(b"", sent), far.recv_pieces(came))
            assert (came.memory == sent.memory[::2]).all()

    run(main())


@pytest.mark.parametrize("way", ["send", "receive"])
def test_abort_ends_the_thread_and_whoever_waits_for_it(run: Run, way: str) -> None:
    async def main() -> None:
        async with pair() as (near, far):
            if way == "send":
                waiting = asyncio.create_task(near.send_pieces(b"", scattered()))
                await under_way(near, waiting)
                near.abort()
            else:
                waiting = asyncio.create_task(far.recv_pieces(empty()))
                await asyncio.sleep(0.05)
                far.abort()
            with pytest.raises(LinkLost, match="it was closed on this side"):
                await waiting

    run(main())


def test_a_peer_that_vanishes_is_a_lost_link_on_either_side(run: Run) -> None:
    async def main() -> None:
        async with pair() as (near, far):
            sending = asyncio.create_task(near.send_pieces(b"", scattered()))
            await under_way(near, sending)
            far.abort()
            with pytest.raises(LinkLost, match=r"Broken pipe|reset by peer"):
                await sending
        async with pair() as (near, far):
            receiving = asyncio.create_task(far.recv_pieces(empty()))
            await near.send(bytes(100))
            await near.close()
            with pytest.raises(LinkLost, match=f"100 of {PAGES * PAGE_SIZE} bytes came"):
                await receiving

    run(main())


def test_the_thread_works_on_a_descriptor_that_nobody_else_closes(run: Run) -> None:
    """A number is given out again at once: pages of a guest would go into whatever has it next."""

    async def main() -> None:
        one, other = socket.socketpair()
        with one, other:
            one.setblocking(False)
            mover = Mover(one.fileno(), select.POLLOUT)
            used: list[int] = []
            assert await mover.run(lambda fd: used.append(fd) or False)
            assert used != [one.fileno()]
            one.close()
            os.fstat(used[0])
            mover.stop()
            mover.stop()
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(used[0])
            assert not await mover.run(lambda _: True)  # and it says that it did nothing

    run(main())


def test_without_a_descriptor_or_a_thread_to_be_had_the_link_is_lost_and_says_why(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> int:
        raise OSError(24, "Too many open files")

    def crowded(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        async with pair() as (near, far):
            with monkeypatch.context() as patched:
                patched.setattr(mover.os, "dup", full)
                with pytest.raises(LinkLost, match="Too many open files"):
                    await near.send_pieces(b"", scattered())
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", crowded)
                with pytest.raises(LinkLost, match="Resource temporarily unavailable"):
                    await far.recv_pieces(empty())

    run(main())


@pytest.mark.parametrize("way", ["send", "receive"])
def test_few_pages_never_go_to_a_number_that_was_closed_and_given_out_again(run: Run, way: str) -> None:
    """The connection is dropped just after there was room, or something to read, and before the task goes on."""
    few = Pieces(np.full((8, PAGE_SIZE), 7, np.uint8), np.arange(8, dtype=np.int64))

    async def main() -> None:
        async with pair() as (near, _):
            if way == "send":
                with contextlib.suppress(BlockingIOError):  # until there is no room
                    while True:
                        near._sock.send(bytes(65536))
            moving = asyncio.create_task(near.send_pieces(b"", few) if way == "send" else near.recv_pieces(few))
            while not near._waiting:
                await asyncio.sleep(0)
            number = near._sock.fileno()
            one, other = socket.socketpair()
            with one, other:
                one.setblocking(False)
                for waiter in near._waiting:
                    waiter.set_result(None)
                near.abort()
                os.dup2(one.fileno(), number)
                other.send(b"of somebody else")
                with pytest.raises(LinkLost, match="it was closed on this side"):
                    await moving
                os.close(number)
                assert one.recv(100) == b"of somebody else"
                with pytest.raises(BlockingIOError):
                    other.recv(1, socket.MSG_DONTWAIT)

    run(main())
