"""A snapshot file as a connection that goes one way.

What is written grows in ``PATH.partial`` beside ``PATH`` and takes its name only when it is complete and on the disk:
whoever finds ``PATH`` finds a whole snapshot, or the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

import aiofiles

from amig.aio import settled
from amig.errors import SnapshotError
from amig.transport.partial import PARTIAL, failed, names, open_partial

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

MAGIC: Final = b"amig snapshot 1\n"
"""The first 16 bytes of every snapshot; frames follow."""
GATHER_BYTES: Final = 256 << 10
"""Smaller pieces are put together to so much: each trip to the thread that writes costs about 0.1 ms."""
READ_AHEAD: Final = 256 << 10


class _File:
    """What writer and reader share: one descriptor, used by one thread at a time, never closed under it."""

    def __init__(self, path: str, descriptor: int, file: Any) -> None:
        self._path = path
        self._descriptor = descriptor
        self._file = file
        self._busy = False
        self._closed = False

    @property
    def pages(self) -> None:
        """None: what is to be written is put together first."""
        return

    @property
    def peer(self) -> str:
        """The file's address."""
        return f"file:{self._path}"

    @property
    def identity(self) -> bytes:
        """Empty: a file proves nothing."""
        return b""

    def outstanding(self) -> int | None:
        """Unknown for a file."""
        return None

    async def close(self) -> None:
        """Let go of the file; one being written is removed unless it was sealed. Idempotent."""
        self.abort()

    def abort(self) -> None:
        """Let go of the file at once, or as soon as the thread that uses it is through. Idempotent."""
        if not self._closed:
            self._closed = True
            if not self._busy:
                self._let_go()

    async def _work(self, work: Coroutine[Any, Any, T]) -> T:
        if self._busy or self._closed:
            work.close()
            raise RuntimeError(f"{self.peer} is in use by another task" if self._busy else f"{self.peer} is closed")
        self._busy = True
        try:
            return await settled(work)
        finally:
            self._busy = False
            if self._closed:
                self._let_go()

    def _let_go(self) -> None:
        os.close(self._descriptor)


class FileWriter(_File):
    """`Connection` that writes a snapshot. `seal` gives it its name; everything else removes it."""

    def __init__(self, path: str, descriptor: int, file: Any) -> None:
        super().__init__(path, descriptor, file)
        self._gathered = bytearray(MAGIC)
        self._sent = 0
        self._sealed = False
        self._failed = False

    @property
    def bytes_sent(self) -> int:
        """Bytes given to this file, its first 16 not counted."""
        return self._sent

    @property
    def bytes_received(self) -> int:
        """Always 0."""
        return 0

    async def send(self, *buffers: Buffer) -> None:
        """Append all buffers; raises `SnapshotError` when the disk won't take them. Cancelling waits for the write."""
        self._usable()
        for buffer in buffers:
            view = memoryview(buffer)
            if view.nbytes:
                self._gathered += view.cast("B")
                self._sent += view.nbytes
        if len(self._gathered) >= GATHER_BYTES:
            await self._work(self._flush())

    async def recv_into(self, *_views: Buffer) -> None:
        """Nothing ever comes from a file that is being written: raises `SnapshotError`."""
        raise SnapshotError(f"{self.peer} is being written and never answers")

    async def seal(self) -> None:
        """Put everything on the disk and give it its name; returns when it would survive a power failure.

        Raises `SnapshotError`, the partial file is then removed and what had the name before is still there. Cancelling
        waits for the disk.
        """
        self._usable()
        try:
            await self._work(self._seal())
        finally:
            self.abort()

    def _usable(self) -> None:
        if self._failed or self._closed:
            raise SnapshotError(f"the snapshot {self._path} was given up: a part of it could not be written")

    async def _flush(self) -> None:
        view = memoryview(self._gathered)
        self._gathered = bytearray()
        while view:
            try:
                view = view[await self._file.write(view) :]
            except OSError as err:
                self._failed = True  # there is a gap now: it must never be sealed
                raise failed(self._path, err) from err

    async def _seal(self) -> None:
        await self._flush()
        try:
            await asyncio.to_thread(self._rename)
        except OSError as err:
            raise failed(self._path, err) from err

    def _rename(self) -> None:
        os.fsync(self._descriptor)
        os.rename(self._path + PARTIAL, self._path)
        self._sealed = True
        folder = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _let_go(self) -> None:
        with contextlib.suppress(OSError):
            if not self._sealed and names(self._path + PARTIAL, self._descriptor):
                os.unlink(self._path + PARTIAL)
        super()._let_go()


class FileReader(_File):
    """`Connection` that reads a snapshot from its start to its end."""

    def __init__(self, path: str, descriptor: int, file: Any) -> None:
        super().__init__(path, descriptor, file)
        self.size = os.fstat(descriptor).st_size
        """Bytes in the file."""
        self._received = 0
        self._store = bytearray(READ_AHEAD)
        self._ahead = memoryview(self._store)[:0]

    @property
    def bytes_sent(self) -> int:
        """Always 0."""
        return 0

    @property
    def bytes_received(self) -> int:
        """Bytes read so far, the first 16 included."""
        return self._received

    async def send(self, *_buffers: Buffer) -> None:
        """A file that is being read takes nothing: raises `SnapshotError`."""
        raise SnapshotError(f"{self.peer} is being read and takes nothing")

    async def recv_into(self, *views: Buffer) -> None:
        """Fill all views; raises `SnapshotError` where the file ends before that. Cancelling waits for the read."""
        for view in views:
            flat = memoryview(view)
            if flat.nbytes:
                await self._fill(flat.cast("B"))

    async def _fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            if self._ahead:
                part = self._ahead[: len(view) - done]
                view[done : done + len(part)] = part
                self._ahead = self._ahead[len(part) :]
                came = len(part)
            elif len(view) - done >= READ_AHEAD:
                came = await self._read(view[done:])
            else:
                self._ahead = memoryview(self._store)[: await self._read(self._store)]
                continue
            done += came
            self._received += came

    async def _read(self, view: Buffer) -> int:
        try:
            came = int(await self._work(self._file.readinto(view)))
        except OSError as err:
            raise SnapshotError(f"can't read {self._path}: {os.strerror(err.errno or 0)}") from err
        if not came:
            raise SnapshotError(f"{self._path} ends after {self._received} bytes: it is not a whole snapshot")
        return came


async def create(path: str) -> FileWriter:
    """Start a snapshot at ``path``; raises `SnapshotError` when none can be written there."""

    async def start() -> FileWriter:
        descriptor = await asyncio.to_thread(open_partial, path)
        return FileWriter(path, descriptor, await aiofiles.open(descriptor, "wb", buffering=0, closefd=False))

    return await settled(start(), undo=FileWriter.abort)


async def read(path: str) -> FileReader:
    """Open a snapshot and read its first 16 bytes; raises `SnapshotError` unless it is one."""

    async def start() -> FileReader:
        descriptor = await asyncio.to_thread(_open_snapshot, path)
        return FileReader(path, descriptor, await aiofiles.open(descriptor, "rb", buffering=0, closefd=False))

    reader = await settled(start(), undo=FileReader.abort)
    magic = bytearray(len(MAGIC))
    try:
        await reader.recv_into(magic)
    except BaseException:
        reader.abort()
        raise
    if magic != MAGIC:
        reader.abort()
        raise SnapshotError(f"{path} is not a snapshot of amig, or one of another version")
    return reader


def _open_snapshot(path: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as err:
        raise SnapshotError(f"can't read {path}: {os.strerror(err.errno or 0)}") from err
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SnapshotError(f"{path} is not an ordinary file")
    return descriptor
