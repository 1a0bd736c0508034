"""Frames and descriptors over a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from amig.control.fdpass import Closed, FrameReader, FrameWriter, close_all
from amig.errors import ControlError


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, two = socket.socketpair()
    one.setblocking(False)
    two.setblocking(False)
    with one, two:
        yield one, two


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def some_fds(count: int) -> Iterator[list[int]]:
    fds = [os.memfd_create(f"fd-{i}") for i in range(count)]
    try:
        yield fds
    finally:
        close_all(fds)


def rights(fds: list[int]) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]


async def test_frames_arrive_whole_and_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    writer, reader = FrameWriter(one), FrameReader(two, limit=1 << 20)
    frames = [b"", b"x", bytes(range(256)) * 2000, b"last"]
    for frame in frames:
        writer.post(frame)
    assert [bytes((await reader.receive())[0]) for _ in frames] == frames
    writer.close()


async def test_a_frame_may_come_byte_by_byte(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    reader = FrameReader(two, limit=100)
    for byte in struct.pack("<I", 3) + b"abc":
        assert reader.pump() is None
        one.send(bytes([byte]))
    assert reader.pump() == (bytearray(b"abc"), [])


async def test_descriptors_belong_to_the_frame_they_came_with(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    writer, reader = FrameWriter(one), FrameReader(two, limit=100, max_fds=4)
    with some_fds(3) as fds:
        writer.post(b"none")
        writer.post(b"two", (fds[0], fds[1]))
        writer.post(b"one", (fds[2],))
        writer.post(b"none again")
        names = []
        for _ in range(4):
            frame, got = await reader.receive()
            names.append((bytes(frame), [os.readlink(f"/proc/self/fd/{fd}").split(":")[1].split()[0] for fd in got]))
            assert not any(os.get_inheritable(fd) for fd in got)
            close_all(got)
    assert names == [(b"none", []), (b"two", ["fd-0", "fd-1"]), (b"one", ["fd-2"]), (b"none again", [])]
    writer.close()


@pytest.mark.parametrize(("sent", "allowed"), [(1, 0), (2, 1), (5, 1), (253, 4)])
def test_more_descriptors_than_allowed_are_closed(
    pair: tuple[socket.socket, socket.socket], sent: int, allowed: int
) -> None:
    one, two = pair
    reader = FrameReader(two, limit=100, max_fds=allowed)
    with some_fds(sent) as fds:
        one.sendmsg([struct.pack("<I", 1) + b"x"], rights(fds))
        before = open_files()
        with pytest.raises(ControlError) as caught:
            reader.pump()
        assert caught.value.code == "descriptors"
        assert open_files() == before


def test_descriptors_spread_over_a_frame_are_counted_together(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    reader = FrameReader(two, limit=100, max_fds=2)
    with some_fds(3) as fds:
        before = open_files()
        one.sendmsg([struct.pack("<I", 3)], rights(fds[:1]))
        one.sendmsg([b"a"], rights(fds[1:2]))
        one.sendmsg([b"b"], rights(fds[2:]))
        with pytest.raises(ControlError) as caught:
            reader.pump()
        assert caught.value.code == "descriptors"
        assert open_files() == before


def test_a_length_beyond_the_limit_is_refused_before_its_payload(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    reader = FrameReader(two, limit=1000)
    one.send(struct.pack("<I", 1001))
    with pytest.raises(ControlError) as caught:
        reader.pump()
    assert caught.value.code == "too-large"


@pytest.mark.parametrize(("sent", "clean"), [(b"", True), (b"\x05\0\0", False), (struct.pack("<I", 5) + b"abc", False)])
def test_the_end_of_the_stream_is_told(pair: tuple[socket.socket, socket.socket], sent: bytes, clean: bool) -> None:
    one, two = pair
    reader = FrameReader(two, limit=1000)
    if sent:
        one.send(sent)
    one.close()
    with pytest.raises(Closed) as caught:
        reader.pump()
    assert caught.value.clean is clean


async def test_a_cancelled_reader_loses_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    reader = FrameReader(two, limit=100)
    one.send(struct.pack("<I", 5) + b"ab")
    waiting = asyncio.ensure_future(reader.receive())
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    one.send(b"cde")
    assert bytes((await reader.receive())[0]) == b"abcde"


async def test_a_writer_that_nobody_reads_holds_its_caller_back(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    writer, reader = FrameWriter(one, limit=1000), FrameReader(two, limit=1 << 20)
    for i in range(20):
        writer.post(bytes([i]) * 100_000)
    waiting = asyncio.ensure_future(writer.drained())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    assert [(await reader.receive())[0][0] for _ in range(20)] == list(range(20))
    await waiting
    await writer.flushed()
    assert writer.buffered == 0
    writer.close()


async def test_posting_to_one_who_left_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    one, two = pair
    writer = FrameWriter(one)
    two.close()
    with some_fds(1) as fds:
        before = open_files()
        writer.post(b"x", (fds[0],))
        with pytest.raises(Closed):
            await writer.drained()
        with pytest.raises(Closed):
            writer.post(b"y", (fds[0],))
        assert open_files() == before
    writer.close()
