"""Scattered pages move by address: the right bytes, in order, however few the kernel takes at a time."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig.memory import PAGE_SIZE, Pages
from amig.pieces import Pieces
from amig.transport.vectors import IOV_MAX, Transfer

PAGES = 3000


def numbered() -> Pages:
    """Memory in which every page is filled with words of its own number."""
    words = np.repeat(np.arange(PAGES, dtype=np.uint64), PAGE_SIZE // 8)
    return words.view(np.uint8).reshape(PAGES, PAGE_SIZE)


MEMORY = numbered()


@given(st.sets(st.integers(0, PAGES - 1), max_size=60))
def test_one_vector_for_each_run_and_each_page_once(wanted: set[int]) -> None:
    pieces = Pieces(MEMORY, np.array(sorted(wanted), np.int64))
    runs = sum(page - 1 not in wanted for page in wanted)
    assert (len(pieces), pieces.nbytes) == (runs, len(wanted) * PAGE_SIZE)
    assert b"".join(pieces.views()) == MEMORY[sorted(wanted)].tobytes()


@given(st.sets(st.integers(0, PAGES - 1), max_size=60))
def test_a_copy_holds_the_pages_in_order_and_nothing_else_is_written(wanted: set[int]) -> None:
    out = np.full((64, PAGE_SIZE), 0xAA, np.uint8)
    part = Pieces(MEMORY, np.array(sorted(wanted), np.int64)).copy_to(out)
    assert bytes(part) == MEMORY[sorted(wanted)].tobytes()
    assert (out[len(wanted) :] == 0xAA).all()


@pytest.mark.parametrize("index", [[-1, 2], [0, PAGES], [PAGES + 5]])
def test_pages_that_the_memory_does_not_have_are_refused(index: list[int]) -> None:
    with pytest.raises(ValueError, match="of a memory of 3000 pages"):
        Pieces(MEMORY, np.array(index, np.int64))


@given(
    wanted=st.sets(st.integers(0, PAGES - 1), min_size=1, max_size=40),
    head=st.binary(max_size=100),
    sizes=st.lists(st.integers(1000, 40_000), min_size=1, max_size=8),
)
def test_pages_arrive_whole_over_a_link_that_takes_and_gives_little_at_a_time(
    wanted: set[int], head: bytes, sizes: list[int]
) -> None:
    index = np.array(sorted(wanted), np.int64)
    landed = np.zeros_like(MEMORY)
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        going = Transfer(Pieces(MEMORY, index).vectors, head)
        came = bytearray()
        turn = 0
        while going.left:
            try:
                going.write(near.fileno())
            except BlockingIOError:
                came += far.recv(sizes[turn % len(sizes)])
                turn += 1
        near.shutdown(socket.SHUT_WR)
        while part := far.recv(1 << 16):
            came += part
    assert came == head + MEMORY[index].tobytes()

    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        coming = Transfer(Pieces(landed, index).vectors)
        content = memoryview(came)[len(head) :]
        while coming.left:
            size = min(sizes[turn % len(sizes)], 1 << 15)
            os.write(writer, content[:size])
            content = content[size:]
            turn += 1
            while True:
                try:
                    coming.read(reader)
                except BlockingIOError:
                    break
    finally:
        os.close(reader)
        os.close(writer)
    assert (landed[index] == MEMORY[index]).all()
    others = np.setdiff1d(np.arange(PAGES), index)
    assert not landed[others].any()


def test_more_pieces_than_the_kernel_takes_at_once() -> None:
    index = np.arange(0, PAGES, 2)
    assert len(index) > IOV_MAX
    near, far = socket.socketpair()
    with near, far:
        far.settimeout(10)
        near.setblocking(False)
        going = Transfer(Pieces(MEMORY, index).vectors)
        came = bytearray()
        while going.left:
            try:
                going.write(near.fileno())
            except BlockingIOError:
                came += far.recv(1 << 20)
        near.shutdown(socket.SHUT_WR)
        while part := far.recv(1 << 20):
            came += part
    assert came == MEMORY[index].tobytes()


def test_the_end_of_the_stream_and_a_broken_one_are_told_apart() -> None:
    near, far = socket.socketpair()
    with near:
        far.close()
        pieces = Pieces(np.zeros((4, PAGE_SIZE), np.uint8), np.array([1, 3]))
        assert Transfer(pieces.vectors).read(near.fileno()) == 0
        with pytest.raises(BrokenPipeError):
            Transfer(pieces.vectors).write(near.fileno())
