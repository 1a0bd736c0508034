"""A guest that can't go there is refused before anything is sent, in words, and runs on here as if nobody had asked."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import amig
from amig.errors import AmigError, ControlError, MigrationError, Refused, SnapshotError
from amig.events import State, StateChanged
from amig.host.room import Room
from amig.host.service import HostService
from amig.kvm.abi_numbers import Cap
from amig.kvm.system import Kvm
from amig.kvm.vm import Vm
from tests import commands
from tests.moving import (
    CHECK,
    MIB,
    assert_stayed,
    homes,  # noqa: F401 - a fixture
    hosting,
    machine_of,
    move,
    receiving,
    until,
    verdict,
)

pytestmark = pytest.mark.usefixtures("homes")


async def refused(source: HostService, destination: str, error: type[AmigError], **policy: object) -> str:
    """Migrate in vain; returns the text. No page was sent, and the guest runs here with its log off."""
    states: list[State] = []

    def on_event(event: amig.Event) -> None:
        if isinstance(event, StateChanged):
            states.append(event.state)

    with pytest.raises(error) as caught:
        await move(source, destination, amig.Policy(**policy), on_event=on_event)  # type: ignore[arg-type]
    assert set(states) == {State.CONNECTING, State.FAILED}
    await assert_stayed(source)
    return str(caught.value)


async def arrives(source: HostService, target: amig.Reception) -> None:
    """What was refused was the guest, not the next one."""
    await move(source, target.address, amig.Policy(downtime=1))
    await target.arrived()
    assert await verdict(machine_of(target.service)) == 0


def shared_memory() -> int:
    """Bytes of this process's shared memory that are backed: guests' memory."""
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("RssShmem:") + 1]) << 10


# --- memory ----------------------------------------------------------------------------------------------------------


async def test_a_destination_with_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = Room(bytes=5 * MIB, limit="control group /small")
    async with hosting(engine="simulator") as source, receiving() as target:
        with monkeypatch.context() as here:
            here.setattr("amig.host.stock.room", lambda **_: tight)
            text = await refused(source, target.address, Refused)
        assert f"guest {source.name} needs " in text
        assert "of memory now, and 5 MiB are left here (control group /small): free some" in text
        assert not target.service.hosted.has_machine
        await arrives(source, target)


async def test_a_destination_that_takes_no_guest_of_that_size() -> None:
    async with (
        hosting(engine="simulator") as source,
        amig.Reception("tcp://127.0.0.1:0", name="b", max_memory=32 * MIB) as target,
    ):
        text = await refused(source, target.address, Refused)
        assert f"guest {source.name} has 64 MiB of memory, and this host takes guests of up to 32 MiB" in text


async def test_memory_prepared_for_a_guest_that_was_refused_waits_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    async with (
        hosting(engine="simulator") as source,
        amig.Reception("tcp://127.0.0.1:0", name="b", memory=96 * MIB, on_note=notes.append) as target,
    ):
        prepared = target._stock._ready
        assert target._stock.prepared == 96 * MIB
        with monkeypatch.context() as there:
            there.setattr("amig.session.verify.features", lambda _: ("teleport",))
            await refused(source, target.address, Refused)
        assert target._stock._ready is prepared
        await arrives(source, target)
        memory = machine_of(target.service).memory
        assert memory is prepared
        assert [os.fstat(fd).st_blocks * 512 for fd in memory.fds().values()] == [64 * MIB], "the rest was given back"
        assert notes == []


async def test_memory_that_a_failed_attempt_used_is_given_back_and_made_ready_again() -> None:
    slow = amig.Policy(bandwidth=5e6)
    async with (
        hosting(engine="simulator") as source,
        amig.Reception("tcp://127.0.0.1:0", name="b", memory=96 * MIB) as target,
    ):
        first, before = target._stock._ready, shared_memory()
        async with amig.Migration(source.name, target.address, slow) as migration:
            async for event in migration:
                if isinstance(event, amig.Progress) and event.bytes_sent:
                    used = machine_of(target.service).memory
                    migration.cancel()
        assert used is first
        await until(lambda: target._stock.prepared == 96 * MIB, "memory is made ready for the next guest")
        assert target._stock._ready is not first
        gc.collect()  # what the migrator had mapped goes with what it was doing
        assert shared_memory() < before + 8 * MIB, "the first memory was given back"
        await assert_stayed(source)
        await arrives(source, target)


async def test_a_guest_larger_than_what_was_prepared_comes_all_the_same_and_somebody_is_told() -> None:
    notes: list[str] = []
    async with (
        hosting(engine="simulator") as source,
        amig.Reception("tcp://127.0.0.1:0", name="b", memory=32 * MIB, on_note=notes.append) as target,
    ):
        await arrives(source, target)
        assert len(notes) == 1
        assert "a guest of 64 MiB does not fit the 32 MiB that were prepared" in notes[0]


def test_a_receiver_whose_address_space_is_limited() -> None:
    with (
        commands.running("a", "--memory", "4GiB") as source,
        commands.receiving("b") as (target, address),
    ):
        resource.prlimit(target.popen.pid, resource.RLIMIT_AS, (3 << 30, 3 << 30))
        said = commands.amig("migrate", "a", address)
        assert said.code == Refused.exit_code
        assert "can't map 4294967296 bytes of guest memory: Cannot allocate memory; is there a limit" in said.err
        target.until("failed")
        assert commands.ok("status", "a", "--json").lines[0]["state"] == "running"
        assert source.popen.poll() is None


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few pages."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"can't mount a small file system: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(place: Path) -> None:
    with pytest.raises(OSError, match="No space"), (place / "rubbish").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


async def test_a_snapshot_that_does_not_fit_on_the_disk(small_disk: Path) -> None:
    async with hosting(engine="simulator") as source:
        text = await refused(source, f"file:{small_disk}/snap", SnapshotError)
        assert f"can't write the snapshot {small_disk}/snap: " in text
        assert "of the guest's memory are in use and 64 KiB are free there" in text
        assert os.listdir(small_disk) == []
        fill(small_disk)
        with pytest.raises(SnapshotError, match="the disk is full"):
            await move(source, f"file:{small_disk}/snap", amig.Policy(compression="zstd"))
        await assert_stayed(source)
        assert os.listdir(small_disk) == ["rubbish"]


async def test_a_destination_that_can_not_write_its_record(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(engine="simulator") as source, receiving() as target:
        fill(small_disk)
        (small_disk / "handover").mkdir(mode=0o700)
        with monkeypatch.context() as there:
            there.setattr(target.service.hosted.records, "root", small_disk / "handover")
            text = await refused(source, target.address, Refused)
        assert f"can't make the handover record {small_disk}/handover/" in text
        assert "No space left on device" in text
        assert os.listdir(small_disk / "handover") == []
        await arrives(source, target)


async def test_a_source_that_can_not_write_its_record(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(engine="simulator") as source, receiving() as target:
        fill(small_disk)
        (small_disk / "handover").mkdir(mode=0o700)
        with monkeypatch.context() as here:
            here.setattr(source.hosted.records, "root", small_disk / "handover")
            text = await refused(source, target.address, ControlError)
        assert "can't make the handover record" in text
        assert "No space left on device" in text
        await arrives(source, target)


# --- processors ------------------------------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_a_destination_whose_kvm_lacks_a_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Kvm.check_extension
    async with hosting(CHECK) as source, receiving() as target:
        with monkeypatch.context() as there:
            there.setattr(Kvm, "check_extension", lambda self, cap: 0 if cap is Cap.XCRS else ask(self, cap))
            text = await refused(source, target.address, Refused)
        assert "this KVM lacks KVM_CAP_XCRS, which amig needs" in text
        await arrives(source, target)


@pytest.mark.kvm
async def test_a_destination_with_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    from amig.host import kvm_board

    async with hosting(CHECK) as source, receiving() as target:
        ours = kvm_board.offered_cpuid
        with monkeypatch.context() as there:
            there.setattr(
                "amig.host.kvm_machine.kvm_board.offered_cpuid",
                lambda kvm: tuple(e._replace(ecx=e.ecx & ~(1 << 20)) if e.leaf == 1 else e for e in ours(kvm)),
            )
            text = await refused(source, target.address, Refused)
        assert "this host's processor lacks what the guest may use: sse4_2; start the guest without them" in text
        with monkeypatch.context() as there:
            there.setattr("amig.host.kvm_machine.kvm_board.offered_cpuid", lambda kvm: ours(kvm)[1:])
            text = await refused(source, target.address, Refused)
        assert "lacks what the guest may use: vendor " in text
        await arrives(source, target)


@pytest.mark.kvm
async def test_a_destination_whose_clock_runs_at_another_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(CHECK) as source, receiving() as target:
        description = source.hosted._description
        fields = msgspec.msgpack.decode(description)
        source.hosted._description = msgspec.msgpack.encode(fields | {"tsc_khz": fields["tsc_khz"] * 2})
        ask = Kvm.check_extension
        with monkeypatch.context() as there:
            there.setattr(Kvm, "check_extension", lambda self, cap: 0 if cap is Cap.TSC_CONTROL else ask(self, cap))
            text = await refused(source, target.address, Refused)
        assert f"the guest's TSC runs at {fields['tsc_khz'] * 2} kHz, this host's at {fields['tsc_khz']} kHz" in text
        source.hosted._description = description
        await arrives(source, target)


@pytest.mark.kvm
async def test_a_host_that_logs_by_ring_takes_guests_on_kvm_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        hosting(engine="simulator") as simulated,
        hosting(CHECK) as source,
        amig.Reception("tcp://127.0.0.1:0", name="b", dirty_ring=65536) as target,
    ):
        text = await refused(simulated, target.address, Refused)
        assert "runs on the engine 'simulator'; this host has kvm" in text
        ask = Kvm.check_extension
        rings = (Cap.DIRTY_LOG_RING, Cap.DIRTY_LOG_RING_ACQ_REL)
        with monkeypatch.context() as there:
            for kind in (Kvm, Vm):
                there.setattr(kind, "check_extension", lambda self, cap: 0 if cap in rings else ask(self, cap))
            text = await refused(source, target.address, Refused)
        assert "this KVM has no dirty ring (there since Linux 5.11): use the bitmap" in text
        await arrives(source, target)
        assert target.service.guest().info.strategies == ("ring",)


# --- protocols -------------------------------------------------------------------------------------------------------


async def test_a_feature_that_the_destination_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(engine="simulator") as source, receiving() as target:
        with monkeypatch.context() as there:
            there.setattr("amig.session.verify.features", lambda _: ("teleport",))
            text = await refused(source, target.address, Refused)
        assert text.endswith("the source requires teleport, which this side does not know: upgrade it")
        await arrives(source, target)


class Tomorrow(commands.Process):
    """A command of a release that speaks the next version of the protocol."""

    def __init__(self, *words: str) -> None:
        code = "from amig.wire import limits; limits.VERSION = 99; from amig.cli import main; main()"
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self._data = self.errors = b""


async def test_a_destination_of_another_version() -> None:
    target = Tomorrow("receive", "tcp://127.0.0.1:0", "--name", "b", "--json")
    try:
        target.until('"listening"')
        async with hosting(engine="simulator") as source:
            text = await refused(source, target.said[0]["listening"], Refused)
            assert "the peer speaks version 1 of the migration protocol, this side version 99" in text
            assert "use releases of amig on both sides that share one" in text
            target.until('"failed"')
    finally:
        target.popen.kill()
        target.popen.communicate()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
async def test_no_text_is_a_bare_number(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Where no small file system can be mounted: what a full disk says, on the way to the user."""

    def full(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    async with hosting(engine="simulator") as source, receiving() as target:
        with monkeypatch.context() as there:
            there.setattr("amig.host.record.os.fsync", full)
            with pytest.raises((Refused, MigrationError)) as caught:
                await move(source, target.address)
        assert os.strerror(error) in str(caught.value)
        await assert_stayed(source)
