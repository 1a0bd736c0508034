"""A lost answer to COMMIT: who asks again, who answers, and what a killed host finds when it is started again.

Real processes of `amig run` and `amig receive`; the migrator is played, so that it can die where it hurts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amig import errors
from amig.guest import Handover
from amig.host.attach import open_guest
from amig.host.handover import Records
from amig.host.record import RecordState
from tests.commands import SIMULATED, Process, amig, homes, ok, receiving, running, wait

__all__ = ["homes"]

pytestmark = pytest.mark.usefixtures("homes")
ID = "0123456789abcdef" * 2


def answer_is(state: RecordState | None) -> None:
    """Give the destination's record of the migration."""
    records = Records()
    if state is None:
        return
    arrival = records.arriving("b")
    arrival.expect(ID)
    if state is RecordState.RUNNING:
        arrival.run(ID)
    elif state is RecordState.DISCARDED:
        arrival.discard(ID)
    arrival.close()


async def _commit(name: str, destination: str) -> None:
    """A migrator that dies right after COMMIT."""
    guest = await open_guest(name)
    await guest.prepare(Handover(migration=ID, destination=destination, peer="far/b"))
    await guest.pause()
    await guest.commit(ID)
    await guest.close()


@contextmanager
def in_doubt(destination: str) -> Iterator[Process]:
    with running("a") as host:
        asyncio.run(_commit("a", destination))
        yield host


def nobody_there(path: Path) -> str:
    return f"unix:{path}/nobody"


def test_the_host_asks_by_itself_and_goes_on_when_the_destination_has_discarded() -> None:
    with receiving("b") as (_, address):
        answer_is(RecordState.ARRIVING)
        with in_doubt(address) as host:
            host.until("will never run a")
            wait(lambda: ok("status", "a", "--json").lines[0]["state"] == "running", "it runs on")
            assert ok("verify", "a").code == 0
    record = Records().source("a")
    assert record is not None
    assert record.state is RecordState.RETURNED
    wait(lambda: Records().outcome(ID) is None, "the answer was confirmed and is not kept")


def test_the_host_asks_by_itself_and_ends_when_the_guest_runs_there() -> None:
    with receiving("b") as (_, address):
        answer_is(RecordState.RUNNING)
        with in_doubt(address) as host:
            said = host.end()
            assert said.code == 0
            assert said.lines[-1]["how"] == "moved"


def test_what_nobody_knows_there_stays_in_doubt_and_both_are_told() -> None:
    with receiving("b") as (_, address), in_doubt(address) as host:
        host.until("stays in doubt")
        assert "IN DOUBT" in ok("list").out
        asked = amig("resolve", "a")
        assert asked.code == errors.HostError.exit_code
        for part in ("nothing is known here of migration", address, "--run-here", "--discard"):
            assert part in asked.err
        ok("resolve", "a", "--run-here")
        assert ok("status", "a", "--json").lines[0]["state"] == "running"


def test_resolve_asks_as_soon_as_the_destination_is_back(tmp_path: Path) -> None:
    with in_doubt(f"unix:{tmp_path}/there") as host:
        host.until("stays in doubt")
        assert amig("resolve", "a").code == errors.HostError.exit_code
        answer_is(RecordState.RUNNING)
        with receiving("b", f"unix:{tmp_path}/there"):
            said = amig("resolve", "a")
            # The host may have been quicker than we.
            assert "runs at" in said.out or said.code in (errors.HostError.exit_code, errors.NoSuchGuest.exit_code)
            assert host.end().code == 0
    record = Records().source("a")
    assert record is not None
    assert record.state is RecordState.RELEASED


@pytest.mark.parametrize("state", [RecordState.RUNNING, RecordState.DISCARDED, RecordState.ARRIVING, None])
def test_a_killed_host_that_is_started_again_asks_first(state: RecordState | None, tmp_path: Path) -> None:
    there = f"unix:{tmp_path}/there"
    with in_doubt(there) as host:
        host.popen.kill()
        host.end()
    refused = amig("run", "a", *SIMULATED)
    assert refused.code == errors.HostError.exit_code
    assert "--run-here" in refused.err
    answer_is(state)
    with receiving("b", there):
        if state in (RecordState.DISCARDED, RecordState.ARRIVING):
            with running("a") as again:
                assert "will never run it" in again.until("doubt")
            return
        started = amig("run", "a", *SIMULATED)
        assert started.code == errors.HostError.exit_code
        if state is RecordState.RUNNING:
            assert "moved to" in started.err
            assert Records().source("a").state is RecordState.RELEASED  # type: ignore[union-attr]
        else:
            assert "IN DOUBT" in ok("list").out
        assert amig("run", "a", *SIMULATED).code == errors.HostError.exit_code, "and not the second time either"


def test_a_receiver_that_was_killed_answers_when_it_is_started_again(tmp_path: Path) -> None:
    there = f"unix:{tmp_path}/there"
    with receiving("b", there) as (host, _):
        arrival = Records().arriving("b")
        arrival.expect(ID)
        arrival.close()
        host.popen.kill()
        host.end()
    with in_doubt(there), receiving("b", there):
        wait(lambda: ok("status", "a", "--json").lines[0]["state"] == "running", "it runs on")


def test_after_an_ordinary_move_no_answer_is_kept_and_nobody_listens_any_more() -> None:
    with running("a") as source, receiving("b") as (destination, address):
        ok("migrate", "a", address, "--downtime", "5s")
        assert source.end().code == 0
        destination.until('"running"')
        wait(lambda: not list(Records().root.glob("*.destination")), "the answer is settled")
        with receiving("c", address):  # the port is free again
            assert ok("verify", "b").code == 0
        assert [path.name for path in Records().root.iterdir()] == ["a.source"]
        assert os.environ["XDG_STATE_HOME"] in str(Records().root)


def test_the_operators_word_counts_without_asking(tmp_path: Path) -> None:
    with in_doubt(nobody_there(tmp_path)):
        assert Records().outcome(ID) is None
        ok("resolve", "a", "--run-here")
        assert ok("status", "a", "--json").lines[0]["state"] == "running"
