"""Disks that are full: every operation on a handover record, on both sides, and every frame of a snapshot.

What fails is the real call (ENOSPC), on files under the state directory only, once or from then on; a snapshot runs
into the kernel's own limit on the size of a file.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import amig
from amig.errors import AmigError
from amig.host.record import state_dir
from amig.transport.file import MAGIC
from amig.wire.frames import HEADER_SIZE, decode_header
from amig.wire.states import SNAPSHOT_WRITER, SnapshotState, SnapshotWriterProtocol
from tests.faults.cases import F, S, Send
from tests.faults.world import World, assert_nothing_left, intact, play, traces, world
from tests.moving import homes, hosting

__all__ = ["homes"]

pytestmark = pytest.mark.usefixtures("homes")
CALLS = ("pwrite", "fdatasync", "fsync", "link", "open", "mkdir")
MOST = 40
"""More disk operations than a migration makes."""


class FullDisk:
    """Counts the calls that need room under the state directory, and refuses those from ``first`` on."""

    def __init__(self, patch: pytest.MonkeyPatch, first: int, *, sticky: bool) -> None:
        self.first = first
        self.sticky = sticky
        self.healed = False
        self.count = 0
        self.refused: list[str] = []
        self._root = str(state_dir())
        for name in CALLS:
            patch.setattr(os, name, self._guard(name, getattr(os, name)))

    def _guard(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(what: Any, *arguments: Any, **more: Any) -> Any:
            if self._ours(name, what, arguments):
                number, self.count = self.count, self.count + 1
                if not self.healed and (number == self.first or (self.sticky and number > self.first)):
                    self.refused.append(name)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(what, *arguments, **more)

        return guarded

    def _ours(self, name: str, what: Any, arguments: tuple[Any, ...]) -> bool:
        try:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
        except OSError:
            return False
        if name == "open" and not (arguments and arguments[0] & os.O_CREAT):
            return False
        return str(path).startswith(self._root)


async def full_at(number: int, *, sticky: bool, patch: pytest.MonkeyPatch) -> int:
    """Migrate with the disk full from its ``number``-th operation on; returns how many were refused."""
    before = traces()
    with patch.context() as own:
        async with world(own) as here:
            disk = FullDisk(own, number, sticky=sticky)
            here.operator_decides = True  # where not even a record can be taken back, it is unlinked

            async def heals(w: World) -> None:
                """The operator makes room once the migration has ended."""
                settled = w.relay.drop

                async def drop() -> None:
                    disk.healed = True
                    await settled()

                own.setattr(w.relay, "drop", drop)

            result = await play(here, heals)
            if disk.refused and result.status != "completed":
                assert result.error
            del here
    await assert_nothing_left(before)
    return len(disk.refused)


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for-good"])
async def test_a_full_disk_at_every_operation_on_a_record(sticky: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(MOST):
        try:
            struck = await full_at(number, sticky=sticky, patch=monkeypatch)
        except BaseException as error:
            error.add_note(f"at disk operation {number}")
            raise
        if not struck:
            assert number > 8, "there is more to a handover than that"
            return
    pytest.fail("a migration makes more disk operations than were tried")


@pytest.mark.parametrize("number", [1, 6, 12])
async def test_a_full_disk_at_a_few_operations(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await full_at(number, sticky=True, patch=monkeypatch)


# --- a file system that is really full -------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A file system of 64 KiB at ``path``; skips where we may not mount."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "amig-faults", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    """Leave no room on the file system of ``path``."""
    with (path / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))


async def test_a_disk_that_is_full_before_refuses_the_migration(homes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(homes / "state"):
        async with world(monkeypatch) as here:
            fill(homes / "state")

            async def room(w: World) -> None:
                settled = w.relay.drop

                async def drop() -> None:
                    (homes / "state" / "ballast").unlink(missing_ok=True)
                    await settled()

                monkeypatch.setattr(w.relay, "drop", drop)

            result = await play(here, room)
        assert "No space left" in str(result.error)


async def test_a_disk_that_fills_up_during_the_migration_does_not_matter(
    homes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(homes / "state"):
        async with world(monkeypatch) as here:

            async def attach(w: World) -> None:
                async def full() -> None:
                    fill(homes / "state")

                w.relay.on(Send("source", S.MEMORY, F.BLOCK), full)

            result = await play(here, attach)
        assert result.status == "completed", "the records are preallocated"


# --- snapshots -------------------------------------------------------------------------------------------------------


def frames(path: Path) -> dict[tuple[SnapshotState, F], int]:
    """Return where the middle of the first frame of each kind in each state lies."""
    data = path.read_bytes()
    protocol, at, found = SnapshotWriterProtocol(), len(MAGIC), {}
    while at < len(data):
        header = decode_header(data[at : at + HEADER_SIZE])
        found.setdefault((protocol.state, header.type), at + HEADER_SIZE + header.length // 2)
        protocol.sent(header.type)
        at += HEADER_SIZE + header.length
    return found


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NEVER_IN_A_SNAPSHOT = {
    (SnapshotState.SWITCHOVER, F.STATE): "the state of so small a guest is one part",
    (SnapshotState.SWITCHOVER, F.BLOCK): "device state is the last thing written before END",
    (SnapshotState.SWITCHOVER, F.ROUND): "as above",
}


@pytest.mark.parametrize("stop", [False, True], ids=["live", "stop"])
async def test_a_snapshot_that_can_not_be_written_at_any_frame(stop: bool, tmp_path: Path) -> None:
    before = traces()
    async with hosting("workload=check ws=1M rate=4M report=0", engine="simulator", memory=4 << 20) as source:
        await source.hosted.operator_pause()  # so that each snapshot is as long as the first
        whole = tmp_path / "whole"
        policy = amig.Policy(verify="full")
        async with amig.Migration(source.name, f"file:{whole}", policy):
            pass
        places = frames(whole)
        assert set(places) | set(NEVER_IN_A_SNAPSHOT) == {
            (state, event.type) for state, events in SNAPSHOT_WRITER.items() for event in events
        }
        for place, size in places.items():
            target = tmp_path / "snapshot"
            with files_end_at(size):
                with pytest.raises(AmigError):
                    async with amig.Migration(source.name, f"file:{target}", policy, stop=stop):
                        pass
            assert source.hosted.state is amig.RunState.PAUSED, place
            assert not list(tmp_path.glob("snapshot*")), place
        await source.hosted.operator_resume()
        await intact(source)
    await assert_nothing_left(before)
