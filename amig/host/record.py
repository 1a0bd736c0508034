"""Durable handover records: which side may run a guest, after any crash of anybody.

A record is a file of two slots of 4096 bytes. Each write goes to the slot that does not hold the newest record, so a
torn write leaves the one before it. A slot is a header (magic, version, body length, sequence number, checksum) and a
msgpack body. A source's record is named for the guest, a destination's for the migration. Files are preallocated before
anything depends on them: COMMIT and RUNNING are one write and one fdatasync, and can't fail for want of space.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import xxhash
from msgspec import Meta

from amig.errors import HostError

SLOT = 4096
SIZE = 2 * SLOT
_MAGIC = b"amig-rec"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQ")
"""magic, version, body length, sequence, xxh3 of (body length, sequence, body)."""


class RecordState(enum.StrEnum):
    """What a record says."""

    PREPARED = "prepared"
    """Source: the file is there; nothing has been handed over."""
    COMMITTED = "committed"
    """Source: the destination may be running the guest; this side must not, until it knows better."""
    RELEASED = "released"
    """Source: the destination runs it."""
    RETURNED = "returned"
    """Source: the destination will never run it; the guest is ours again."""
    ARRIVING = "arriving"
    """Destination: it is being received; whoever asks for it now makes it DISCARDED."""
    RUNNING = "running"
    """Destination: we run it."""
    DISCARDED = "discarded"
    """Destination: we never will."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One state of one handover."""

    state: RecordState
    guest: Annotated[str, Meta(max_length=256)]
    migration: Annotated[str, Meta(pattern=r"^([0-9a-f]{32})?\Z")] = ""
    destination: Annotated[str, Meta(max_length=1024)] = ""
    peer: Annotated[str, Meta(max_length=1024)] = ""
    written: float = 0.0
    """Unix time."""


def state_dir() -> Path:
    """Return where records live: $XDG_STATE_HOME/amig, or ~/.local/state/amig when that is unset or not absolute."""
    base = os.environ.get("XDG_STATE_HOME", "")
    home = Path(base) if base.startswith("/") else Path.home() / ".local" / "state"
    return home / "amig"


class BadRecord(HostError):
    """A record file that can't be believed; the text names it and says what to do."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"the handover record {path} can't be read ({why}), so it is unknown whether this guest was handed over to "
            "another host. Find out where the guest runs; if it runs nowhere else, remove the file and try again"
        )


def encode_slot(record: Record, sequence: int) -> bytes:
    """Return the 4096 bytes of a slot; raises `HostError` when the texts are too long."""
    body = msgspec.msgpack.encode(record)
    if _HEADER.size + len(body) > SLOT:
        raise HostError("a handover record takes at most 4 KiB: shorten the destination's address")
    head = _HEADER.pack(_MAGIC, _VERSION, len(body), sequence, _checksum(sequence, body))
    return (head + body).ljust(SLOT, b"\0")


def _checksum(sequence: int, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<QQ", len(body), sequence) + body)


def decode_slot(slot: bytes) -> tuple[int, Record] | None:
    """Return sequence and record of a slot, or None when it holds no valid one."""
    if len(slot) != SLOT:
        return None
    magic, version, length, sequence, checksum = _HEADER.unpack_from(slot)
    if magic != _MAGIC or version != _VERSION or length > SLOT - _HEADER.size:
        return None
    body = slot[_HEADER.size : _HEADER.size + length]
    if _checksum(sequence, body) != checksum:
        return None
    try:
        return sequence, msgspec.msgpack.decode(body, type=Record)
    except (ValueError, RecursionError):  # what msgspec refuses, and text that is no UTF-8
        return None


class RecordFile:
    """An open record. Calls block; not for two threads at once."""

    def __init__(self, path: Path, fd: int, sequence: int, current: Record | None) -> None:
        self.path = path
        self._fd = fd
        self._sequence = sequence
        self._current = current

    @classmethod
    def open(cls, path: Path, *, create: bool) -> RecordFile:
        """Open a record file, or make and preallocate it; durable when this returns.

        Raises `BadRecord` for a file that is not ours, not a record, or damaged in both slots, `HostError` when there
        is no room, FileNotFoundError when it is missing and not to be made.
        """
        if create:
            with contextlib.suppress(FileExistsError):
                _create(path)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BadRecord(path, error.strerror or "error") from None
        try:
            sequence, current = _load(path, fd)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, sequence, current)

    @property
    def current(self) -> Record | None:
        """What it says; None when nothing was ever written to it."""
        return self._current

    def decide(self, state: RecordState) -> RecordState:
        """Make an ARRIVING record say ``state``, durably, and return what it says: the first who decides is right.

        Safe between threads and processes that have opened the file each for itself. Raises `HostError`.
        """
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            self._sequence, self._current = _load(self.path, self._fd)
            if self._current is None:
                raise HostError(f"the handover record {self.path} was never begun")
            if self._current.state is RecordState.ARRIVING:
                self._decide(state)
            return self._current.state
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _decide(self, state: RecordState) -> None:
        assert self._current is not None  # noqa: S101 - as the caller has seen
        try:
            self.write(msgspec.structs.replace(self._current, state=state))
        except HostError:
            _, left = _load(self.path, self._fd)
            if left is not None and left.state is RecordState.RUNNING:
                # It can't be taken back, and is not true. No answer at all leaves the guest in doubt, not lost.
                with contextlib.suppress(OSError):
                    self.path.unlink()
            raise

    def write(self, record: Record) -> None:
        """Make ``record`` what the file says: one write, one fdatasync.

        Raises `HostError`; then the file says what it said before, as far as the disk still does what it is told.
        """
        record = msgspec.structs.replace(record, written=time.time())
        sequence = self._sequence + 1
        slot, place = encode_slot(record, sequence), SLOT * (sequence % 2)
        try:
            written = os.pwrite(self._fd, slot, place)
            os.fdatasync(self._fd)
        except OSError as error:
            # Not known to be on the disk, but what anybody reads now: nobody acts by it, so nobody may read it.
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, bytes(SLOT), place)
            raise HostError(f"can't write the handover record {self.path}: {error.strerror}") from error
        if written != SLOT:
            raise HostError(f"can't write the handover record {self.path}: only {written} of {SLOT} bytes went out")
        self._sequence, self._current = sequence, record

    def remove(self) -> None:
        """Remove the file, durably, and close it, in any case. Raises `HostError`."""
        try:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
                sync_dir(self.path.parent)
        except OSError as error:
            raise HostError(f"can't remove the handover record {self.path}: {error.strerror}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Close it; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _create(path: Path) -> None:
    """Make an empty, preallocated record; raises FileExistsError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise
    except OSError as error:
        raise HostError(f"can't make the handover record {path}: {error.strerror}") from error
    try:
        # zeros written, not only reserved: a later write into unwritten extents would need metadata, which can fail
        _write_zeros(fd)
        sync_dir(path.parent)
    except OSError as error:
        path.unlink()
        raise HostError(f"can't make the handover record {path}: {error.strerror}") from error
    finally:
        os.close(fd)


def _write_zeros(fd: int) -> None:
    at = 0
    while at < SIZE:  # a disk that is nearly full takes a part, and says so only when asked for the rest
        at += os.pwrite(fd, bytes(SIZE - at), at)
    os.fsync(fd)


def _load(path: Path, fd: int) -> tuple[int, Record | None]:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BadRecord(path, "not a regular file")
    if status.st_uid != os.geteuid():
        raise BadRecord(path, "it belongs to another user")
    if status.st_size != SIZE:
        # the zeros were never written whole, so nothing can have depended on it
        if status.st_size < SIZE and not any(os.pread(fd, SIZE, 0)):
            try:
                _write_zeros(fd)
            except OSError as error:
                raise HostError(f"can't make the handover record {path}: {error.strerror}") from error
            return 0, None
        raise BadRecord(path, f"{status.st_size} bytes long instead of {SIZE}")
    data = os.pread(fd, SIZE, 0)
    slots = [found for found in (decode_slot(data[:SLOT]), decode_slot(data[SLOT:])) if found]
    if slots:
        return max(slots, key=lambda found: found[0])
    if any(data):
        raise BadRecord(path, "both copies are damaged")
    return 0, None


def sync_dir(path: Path) -> None:
    """Make a change of a directory's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened(path: Path, *, create: bool = False) -> Iterator[RecordFile]:
    """Open a record for the length of a block."""
    record = RecordFile.open(path, create=create)
    try:
        yield record
    finally:
        record.close()
