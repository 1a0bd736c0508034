"""Handover records: what survives a crash, and what is believed of what is found on the disk."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amig.errors import ControlError, HostError, UsageError
from amig.guest import Handover, Outcome
from amig.host.handover import KEPT, ArrivalRecord, Records
from amig.host.record import SIZE, SLOT, BadRecord, Record, RecordFile, RecordState, decode_slot, encode_slot, state_dir

ID = "0123456789abcdef" * 2
HANDOVER = Handover(migration=ID, destination="tcp://far:7000", peer="far/web1")


def record(state: RecordState = RecordState.PREPARED) -> Record:
    return Record(state=state, guest="web1", migration=ID, destination="tcp://far:7000", peer="far/web1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "web1.source"


def reread(path: Path) -> Record | None:
    file = RecordFile.open(path, create=False)
    file.close()
    return file.current


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_record_is_what_was_written_last(path: Path) -> None:
    file = RecordFile.open(path, create=True)
    assert file.current is None
    for state in (RecordState.PREPARED, RecordState.COMMITTED, RecordState.RELEASED):
        file.write(record(state))
        found = reread(path)
        assert found is not None
        assert (found.state, found.migration, found.peer) == (state, ID, "far/web1")
        assert found.written > 0
    file.close()


def test_the_file_is_ours_alone_and_has_its_full_size_from_the_start(path: Path) -> None:
    RecordFile.open(path, create=True).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == SIZE
    assert path.stat().st_blocks * 512 >= SIZE, "a preallocated file has no holes"


def test_a_torn_write_leaves_the_record_before_it(path: Path) -> None:
    file = RecordFile.open(path, create=True)
    file.write(record(RecordState.PREPARED))
    before = path.read_bytes()
    file.write(record(RecordState.COMMITTED))
    after = path.read_bytes()
    file.close()
    for torn in range(0, SIZE + 1, 13):
        path.write_bytes(after[:torn] + before[torn:])
        found = reread(path)
        assert found is not None
        assert found.state in (RecordState.PREPARED, RecordState.COMMITTED)


def test_one_damaged_copy_is_survived_and_two_are_refused(path: Path) -> None:
    file = RecordFile.open(path, create=True)
    file.write(record(RecordState.PREPARED))
    file.write(record(RecordState.COMMITTED))
    file.close()
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert reread(path) is not None
    data[SLOT + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadRecord, match="both copies are damaged") as caught:
        reread(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 100, SLOT, SIZE - 1])
def test_a_file_that_was_never_finished_says_nothing(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    assert reread(path) is None
    assert path.stat().st_size == SIZE


@pytest.mark.parametrize("content", [b"x" * 10, b"x" * SIZE, bytes(SIZE + 1), b"x" * 1_000_000])
def test_what_is_no_record_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(BadRecord):
        reread(path)


def test_a_link_is_not_followed_and_a_pipe_not_waited_for(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(SIZE))
    path.symlink_to(target)
    with pytest.raises(BadRecord):
        reread(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BadRecord):
        reread(path)


@given(st.binary(max_size=SLOT), st.integers(0, SLOT))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_any_bytes_are_a_slot_or_not(noise: bytes, at: int) -> None:
    assert decode_slot(noise.ljust(SLOT, b"\0")) is None
    good = encode_slot(record(), 7)
    mixed = (good[:at] + noise)[:SLOT].ljust(SLOT, b"\0")
    found = decode_slot(mixed)
    assert found is None or found[1] == record()


def test_texts_too_long_for_a_record_are_refused_before_anything_is_written(path: Path) -> None:
    file = RecordFile.open(path, create=True)
    file.write(record())
    with pytest.raises(HostError, match="4 KiB"):
        file.write(Record(state=RecordState.COMMITTED, guest="x", destination="\U0001f600" * 1024))
    file.close()
    found = reread(path)
    assert found is not None
    assert found.state is RecordState.PREPARED


def test_no_room_is_told_before_anything_depends_on_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HostError, match="No space left"):
        RecordFile.open(path, create=True)
    assert not path.exists()


def test_where_records_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_dir() == tmp_path / "amig"
    monkeypatch.setenv("HOME", "/home/somebody")
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert state_dir() == Path("/home/somebody/.local/state/amig")


def test_a_write_is_on_the_disk_before_it_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("pwrite", "fdatasync"):
        real = getattr(os, name)

        def noted(*arguments: object, name: str = name, real: Callable[..., object] = real) -> object:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    file = RecordFile.open(path, create=True)
    calls.clear()
    file.write(record(RecordState.COMMITTED))
    file.close()
    assert calls == ["pwrite", "fdatasync"]


# --- the source ------------------------------------------------------------------------------------------------------


def test_a_committed_guest_is_not_booted_again(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.check_may_boot("web1")
    handover = records.prepare("web1", HANDOVER)
    records.check_may_boot("web1")
    handover.commit()
    handover.close()
    with pytest.raises(HostError) as caught:
        Records(tmp_path).check_may_boot("web1")
    for word in ("tcp://far:7000", "far/web1", ID, "amig resolve web1"):
        assert word in str(caught.value)
    with pytest.raises(HostError):
        records.prepare("web1", HANDOVER)


@pytest.mark.parametrize(
    ("outcome", "state"), [(Outcome.RUNNING, RecordState.RELEASED), (Outcome.DISCARDED, RecordState.RETURNED)]
)
def test_an_operator_can_resolve_what_is_in_doubt(tmp_path: Path, outcome: Outcome, state: RecordState) -> None:
    records = Records(tmp_path)
    with pytest.raises(HostError, match="no handover"):
        records.resolve("web1", outcome)
    handover = records.prepare("web1", HANDOVER)
    with pytest.raises(HostError, match="in doubt"):
        records.resolve("web1", outcome)
    handover.commit()
    handover.close()
    assert records.resolve("web1", outcome).state is state
    records.check_may_boot("web1")
    found = records.source("web1")
    assert found is not None
    assert (found.state, found.migration) == (state, ID)


def test_a_damaged_record_keeps_the_guest_from_booting(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.prepare("web1", HANDOVER).close()
    records.source_path("web1").write_bytes(b"x" * SIZE)
    with pytest.raises(BadRecord):
        records.check_may_boot("web1")


def test_an_abandoned_handover_leaves_nothing(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.prepare("web1", HANDOVER).abandon()
    assert records.source("web1") is None
    assert os.listdir(records.root) == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "x" * 64, "x\n", "é"])
def test_a_name_that_is_none_reaches_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        Records(tmp_path).source(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_not_trusted(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.root.mkdir()
    os.chown(records.root, 12345, 12345)
    with pytest.raises(HostError, match="another user"):
        records.prepare("web1", HANDOVER)


# --- the destination -------------------------------------------------------------------------------------------------


def test_running_is_said_once_and_for_all(tmp_path: Path) -> None:
    records = Records(tmp_path)
    arrival = records.arriving("web1")
    arrival.run(ID)
    arrival.run(ID)
    with pytest.raises(ControlError):
        arrival.discard(ID)
    assert records.outcome(ID) is Outcome.RUNNING
    arrival.close()
    assert records.outcome(ID) is Outcome.RUNNING
    late = records.arriving("web1")
    with pytest.raises(ControlError) as caught:
        late.expect(ID)
    assert caught.value.code == "wrong-migration"
    late.close()
    assert records.outcome(ID) is Outcome.RUNNING
    assert os.listdir(records.root) == [f"{ID}.destination"]


def test_what_arrives_never_runs_once_somebody_has_asked(tmp_path: Path) -> None:
    records = Records(tmp_path)
    arrival = records.arriving("web1")
    arrival.expect(ID)
    assert records.outcome(ID) is Outcome.DISCARDED
    with pytest.raises(ControlError) as caught:
        arrival.run(ID)
    assert caught.value.code == "wrong-state"
    arrival.discard(ID)
    arrival.close()
    assert records.outcome(ID) is Outcome.DISCARDED


def test_nothing_is_said_of_what_was_never_here(tmp_path: Path) -> None:
    records = Records(tmp_path)
    arrival = records.arriving("web1")
    assert records.outcome(ID) is None
    arrival.run(ID)
    assert records.outcome(ID) is Outcome.RUNNING
    arrival.close()


def test_what_its_host_did_not_live_to_decide_is_decided_by_the_question(tmp_path: Path) -> None:
    records = Records(tmp_path)
    arrival = records.arriving("web1")
    arrival.expect(ID)
    arrival.close()  # as a killed process does, by the way
    again = records.arriving("web1")
    assert os.listdir(records.root).count(f"{ID}.destination") == 1
    assert records.outcome(ID) is Outcome.DISCARDED
    again.close()


def test_of_many_who_decide_at_once_one_is_right(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for number in range(20):
        migration = f"{number:032x}"
        arrival = records.arriving("web1")
        arrival.expect(migration)
        ran: list[bool] = []

        def run(arrival: ArrivalRecord = arrival, migration: str = migration, ran: list[bool] = ran) -> None:
            try:
                arrival.run(migration)
            except ControlError:
                ran.append(False)
            else:
                ran.append(True)

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(records.outcome, migration) for _ in range(3)]
            pool.submit(run).result()
            said = {future.result() for future in asked}
        assert said == {Outcome.RUNNING if ran[0] else Outcome.DISCARDED}
        arrival.close()


def test_what_did_not_get_to_the_disk_is_not_read_either(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RecordFile.open(path, create=True)
    file.write(record(RecordState.PREPARED))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", _full)
        with pytest.raises(HostError, match="No space left"):
            file.write(record(RecordState.COMMITTED))
    assert reread(path).state is RecordState.PREPARED  # type: ignore[union-attr]
    file.write(record(RecordState.COMMITTED))
    assert reread(path).state is RecordState.COMMITTED  # type: ignore[union-attr]


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("rollback", [True, False])
def test_a_guest_that_could_not_be_taken_over_is_never_said_to_run(
    rollback: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write came through and the sync did not: nobody ran it, so the answer must not be RUNNING."""
    records = Records(tmp_path)
    arrival = records.arriving("web1")
    arrival.expect(ID)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", _full)
        if not rollback:
            pwrite = os.pwrite
            patch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data, at) if any(data) else _full())
        with pytest.raises(HostError):
            arrival.run(ID)
    assert records.outcome(ID) is (Outcome.DISCARDED if rollback else None)
    arrival.close()


def test_an_answer_that_the_source_has_is_not_kept(tmp_path: Path) -> None:
    records = Records(tmp_path)
    arrival = records.arriving("web1")
    arrival.expect(ID)
    records.settled(ID)
    assert records.outcome(ID) is Outcome.DISCARDED, "an undecided one is not settled"
    arrival.close()
    records.settled(ID)
    records.settled(ID)
    assert os.listdir(records.root) == []


def test_leftovers_and_old_answers_are_tidied_away(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.arriving("web1")._file.close()
    records.arriving("web2")._file.close()
    for migration in (ID, "f" * 32):
        arrival = records.arriving("web3")
        arrival.run(migration)
        arrival.close()
    long_ago = time.time() - KEPT - 1
    os.utime(records.destination_path(ID), (long_ago, long_ago))
    arrival = records.arriving("web1")
    arrival.close()
    left = os.listdir(records.root)
    assert [name.split(".")[0] for name in sorted(left)] == ["f" * 32, "web2"]


def test_a_guest_that_moved_away_is_not_booted_again_but_may_come_back(tmp_path: Path) -> None:
    records = Records(tmp_path)
    handover = records.prepare("web1", HANDOVER)
    handover.commit()
    handover.settle(Outcome.RUNNING)
    handover.close()
    records.check_may_boot("web1")
    with pytest.raises(HostError, match=r"moved to tcp://far:7000.*resolve web1 --run-here"):
        records.check_may_start_anew("web1")
    records.came_back("web1")
    records.check_may_start_anew("web1")


def test_an_operator_may_say_that_it_does_not_run_there_any_more(tmp_path: Path) -> None:
    records = Records(tmp_path)
    handover = records.prepare("web1", HANDOVER)
    handover.commit()
    handover.settle(Outcome.RUNNING)
    handover.close()
    with pytest.raises(HostError):
        records.resolve("web1", Outcome.RUNNING)
    assert records.resolve("web1", Outcome.DISCARDED).state is RecordState.RETURNED
    records.check_may_start_anew("web1")


@pytest.mark.parametrize("migration", ["", "x" * 32, "../" + ID, ID.upper(), ID + "0"])
def test_an_id_that_is_none_reaches_no_file(tmp_path: Path, migration: str) -> None:
    with pytest.raises(ControlError):
        Records(tmp_path).outcome(migration)
