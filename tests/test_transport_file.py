"""Snapshot files: whole or not there, private, and honest about a full disk."""

import asyncio
import errno
import os
import resource
import signal
import stat
import threading
from pathlib import Path

import pytest

from amig.errors import SnapshotError
from amig.transport import file
from amig.transport.partial import open_partial

BLOCK = bytes(range(256)) * 4096


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "web1.snap")


def left(path):
    return sorted(os.listdir(os.path.dirname(path)))


async def test_what_is_written_is_read(path):
    writer = await file.create(path)
    for i in range(5):
        await writer.send(b"head%04d" % i, BLOCK, b"")
    await writer.send(b"end")
    assert writer.bytes_sent == 5 * (8 + len(BLOCK)) + 3
    assert left(path) == ["web1.snap.partial"]
    await writer.seal()
    await writer.close()
    assert left(path) == ["web1.snap"]

    reader = await file.read(path)
    assert reader.size == os.path.getsize(path) == writer.bytes_sent + 16
    head, body, pages = bytearray(8), bytearray(len(BLOCK)), [bytearray(4096) for _ in range(256)]
    for i in range(5):
        await reader.recv_into(head)
        assert head == b"head%04d" % i
        if i % 2:
            await reader.recv_into(*pages)
            assert b"".join(pages) == BLOCK
        else:
            await reader.recv_into(body)
            assert body == BLOCK
    await reader.recv_into(memoryview(head)[:3])
    assert head[:3] == b"end"
    assert reader.bytes_received == reader.size
    with pytest.raises(SnapshotError, match=f"ends after {reader.size} bytes: it is not a whole snapshot"):
        await reader.recv_into(head)
    await reader.close()
    await reader.close()


async def test_only_the_owner_may_read_a_snapshot(path):
    old = os.umask(0)
    try:
        writer = await file.create(path)
    finally:
        os.umask(old)
    await writer.seal()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


async def test_an_unsealed_snapshot_leaves_nothing_and_keeps_the_one_before(path):
    first = await file.create(path)
    await first.send(b"first")
    await first.seal()
    for end in ("close", "abort"):
        second = await file.create(path)
        await second.send(BLOCK)
        await second.close() if end == "close" else second.abort()
        assert left(path) == ["web1.snap"]
        with pytest.raises(SnapshotError, match="was given up"):
            await second.send(b"more")
    assert Path(path).read_bytes() == file.MAGIC + b"first"


async def test_a_sealed_snapshot_replaces_the_one_before(path):
    for content in (b"first", b"second"):
        writer = await file.create(path)
        await writer.send(content)
        await writer.seal()
    assert Path(path).read_bytes() == file.MAGIC + b"second"


async def test_two_at_once_to_one_name_are_refused(path):
    writer = await file.create(path)
    with pytest.raises(SnapshotError, match="another snapshot is being written"):
        await file.create(path)
    await writer.send(b"x")
    await writer.seal()


async def test_what_a_dead_process_left_is_taken_over(path):
    Path(path + ".partial").write_bytes(b"z" * 100_000)
    os.chmod(path + ".partial", 0o644)
    writer = await file.create(path)
    await writer.seal()
    assert os.path.getsize(path) == 16
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


async def test_a_full_disk_says_so_and_the_rest_is_refused(path):
    # The limit on file sizes stands in for a full disk: it needs no file system of our own.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = await file.create(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(SnapshotError, match=r"can't write the snapshot .*file system takes no file of that size"):
            for _ in range(4):
                await writer.send(BLOCK)
        with pytest.raises(SnapshotError, match="was given up"):
            await writer.send(b"the rest")
        with pytest.raises(SnapshotError, match="was given up"):
            await writer.seal()
        await writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert left(path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
async def test_no_space_is_named(path):
    writer = await file.create(path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._descriptor)
    os.close(full)
    with pytest.raises(SnapshotError, match="the disk is full"):
        await writer.send(BLOCK)
    await writer.close()
    os.unlink(path + ".partial")  # the writer can't know it any more: its descriptor was swapped under it


async def test_a_failed_seal_keeps_what_was_there(path, monkeypatch):
    def broken(_descriptor):
        raise OSError(errno.EIO, "no")

    writer = await file.create(path)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(SnapshotError, match="Input/output error"):
        await writer.seal()
    assert left(path) == []


async def test_the_data_are_on_the_disk_before_the_name_and_the_name_before_seal_returns(path, monkeypatch):
    order = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        order.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        real_fsync(descriptor)

    def rename(*names):
        order.append("rename")
        real_rename(*names)

    writer = await file.create(path)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    await writer.seal()
    assert order == ["sync file", "rename", "sync folder"]


async def test_cancelling_waits_for_the_thread_that_writes(path, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    real = os.fsync

    def slow(descriptor):
        started.set()
        go_on.wait(30)
        real(descriptor)

    writer = await file.create(path)
    monkeypatch.setattr(os, "fsync", slow)
    sealing = asyncio.create_task(writer.seal())
    await asyncio.to_thread(started.wait, 30)
    sealing.cancel()
    writer.abort()
    await asyncio.sleep(0)
    assert not sealing.done(), "the thread still uses the descriptor"
    with pytest.raises(RuntimeError, match="in use by another task"):
        await writer._work(writer._flush())
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await sealing
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writer._descriptor)


async def test_cancelling_the_start_leaves_nothing(path, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    real = file.open_partial

    def slow(name):
        descriptor = real(name)
        started.set()
        go_on.wait(30)
        return descriptor

    monkeypatch.setattr(file, "open_partial", slow)
    starting = asyncio.create_task(file.create(path))
    await asyncio.to_thread(started.wait, 30)
    assert left(path) == ["web1.snap.partial"]
    starting.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert left(path) == []


@pytest.mark.parametrize("kind", ["folder", "pipe"])
async def test_what_is_not_a_file_is_neither_written_nor_read(path, kind):
    os.mkdir(path) if kind == "folder" else os.mkfifo(path)
    with pytest.raises(SnapshotError, match="not an ordinary file"):
        await file.create(path)
    with pytest.raises(SnapshotError, match="not an ordinary file"):
        await file.read(path)


async def test_a_link_in_the_place_of_the_partial_file_is_not_followed(path, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    os.symlink(victim, path + ".partial")
    with pytest.raises(SnapshotError, match="symbolic links"):
        await file.create(path)
    os.unlink(path + ".partial")
    os.mkfifo(path + ".partial")
    with pytest.raises(SnapshotError, match=r"can't write|not an ordinary file"):
        await file.create(path)
    assert victim.read_bytes() == b"precious"


async def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(SnapshotError, match=r"can't write the snapshot .*No such file"):
        await file.create(str(tmp_path / "no" / "x"))
    with pytest.raises(SnapshotError, match=r"can't read .*No such file"):
        await file.read(str(tmp_path / "no"))


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"", "ends after 0"), (b"short", "ends after 5"), (b"#!/bin/sh\nexit 0\n", "is not a snapshot")],
)
async def test_what_is_not_a_snapshot_is_refused(path, content, text):
    Path(path).write_bytes(content)
    with pytest.raises(SnapshotError, match=text):
        await file.read(path)


async def test_a_file_goes_one_way(path):
    writer = await file.create(path)
    with pytest.raises(SnapshotError, match="never answers"):
        await writer.recv_into(bytearray(1))
    assert (writer.bytes_received, writer.outstanding(), writer.peer) == (0, None, f"file:{path}")
    await writer.seal()
    reader = await file.read(path)
    with pytest.raises(SnapshotError, match="takes nothing"):
        await reader.send(b"x")
    assert reader.bytes_sent == 0
    await reader.close()


def test_a_partial_file_that_vanishes_while_it_is_locked_is_made_again(path, monkeypatch):
    import fcntl

    real = fcntl.flock
    calls = []

    def flock(descriptor, how):
        real(descriptor, how)
        calls.append(how)
        if len(calls) == 1:
            os.unlink(path + ".partial")

    monkeypatch.setattr(fcntl, "flock", flock)
    descriptor = open_partial(path)
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(descriptor), os.stat(path + ".partial"))
    os.close(descriptor)
