"""Every frame of the protocol, in every state, both ways: cut, reset, half-closed, stalled, silenced.

After each case at most one copy has ever run at a time, what the operator was told is true, exactly one copy runs once
the network is back, its memory is intact, and nothing is left behind. ``pytest -m faults`` plays every case and random
ones (AMIG_FAULT_SEED, AMIG_FAULT_COUNT); an ordinary run plays one for each frame and state.
"""

from __future__ import annotations

import os
import random
import time

import pytest

from amig.wire.states import DESTINATION, DESTINATION_LOST, SOURCE, SOURCE_LOST, Way
from tests.faults import cases
from tests.faults.cases import NEVER, SCENARIO_OF, Action, Case, Position, Send
from tests.faults.scenarios import FIRST_FAULT, SCENARIOS
from tests.faults.world import assert_nothing_left, play, traces, world
from tests.moving import homes

__all__ = ["homes"]

pytestmark = pytest.mark.usefixtures("homes")
TRIES = 4
"""A scenario that depends on timing (a cancel between two frames) may miss its frame on a busy machine."""
SEED = int(os.environ.get("AMIG_FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
RANDOM = int(os.environ.get("AMIG_FAULT_COUNT", "100"))


async def survives(case: Case, patch: pytest.MonkeyPatch) -> None:
    """Play a case until its fault has struck, and check everything each time."""
    for _ in range(TRIES):
        before = traces()
        with patch.context() as own:
            faults = [FIRST_FAULT[case.scenario]] if case.scenario in FIRST_FAULT else []
            async with world(own, *faults, case) as here:
                result = await play(here, lambda w: SCENARIOS[case.scenario](w, own))
                struck = case in here.relay.fired
                log = here.relay.log
            del here  # its migration's error holds frames, and those hold what they have mapped
        await assert_nothing_left(before)
        strange = {str(send): NEVER[send] for send in log if NEVER.get(send, cases.CROSSED) != cases.CROSSED}
        assert not strange, "a frame that is said never to be sent there was sent"
        if struck or case.nth:
            assert result.status == "completed" or not (struck and cases.goes_on(case)), result
            return
    pytest.fail(f"the frame never came by; these did: {[str(send) for send in dict.fromkeys(log)]}")


# --- completeness ----------------------------------------------------------------------------------------------------


def uncovered(sends: set[Send]) -> set[Send]:
    return sends - set(SCENARIO_OF) - set(NEVER)


def test_every_frame_in_every_state_has_cases() -> None:
    assert not uncovered(cases.all_sends())
    assert not set(SCENARIO_OF) & set(NEVER)
    assert set(SCENARIO_OF) | set(NEVER) == cases.all_sends(), "something is listed that the tables do not know"
    assert set(SCENARIO_OF.values()) == {name for name in SCENARIOS if not name.startswith(cases.ANEW)}


def test_every_state_is_touched_by_a_case() -> None:
    for side, table, lost in (("source", SOURCE, SOURCE_LOST), ("destination", DESTINATION, DESTINATION_LOST)):
        touched = set()
        for state, events in table.items():
            for event, after in events.items():
                other = {send.type for send in SCENARIO_OF if send.side != side}
                if Send(side, state, event.type) in SCENARIO_OF or (event.way is Way.RECEIVE and event.type in other):
                    touched |= {state, after, lost[state], lost[after]}
        assert touched >= set(table), set(table) - touched


def test_a_new_state_or_frame_without_cases_is_found() -> None:
    novel = Send("source", "warp", cases.F.BLOCK)
    assert uncovered(cases.all_sends() | {novel}) == {novel}
    assert uncovered(cases.all_sends() | {Send("destination", cases.D.DONE, cases.F.HELLO)})


def test_there_are_more_than_five_hundred_cases() -> None:
    every = cases.all_cases()
    assert len(every) == len(set(every))
    assert len(every) >= 500
    assert {case.send for case in cases.one_each()} == set(SCENARIO_OF)


# --- the cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.one_each(), ids=str)
async def test_each_frame_in_each_state_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    await survives(case, monkeypatch)


@pytest.mark.faults
@pytest.mark.parametrize("case", cases.all_cases(), ids=str)
async def test_every_fault_at_every_frame(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    await survives(case, monkeypatch)


@pytest.mark.parametrize("case", cases.anew_cases()[::13], ids=str)
async def test_a_connection_that_is_lost_is_made_anew(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    await survives(case, monkeypatch)


@pytest.mark.faults
@pytest.mark.parametrize("case", cases.anew_cases(), ids=str)
async def test_whatever_is_lost_before_the_end_is_made_anew(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    await survives(case, monkeypatch)


@pytest.mark.faults
@pytest.mark.timeout(1800)
async def test_random_faults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{RANDOM} random faults, AMIG_FAULT_SEED={SEED}", flush=True)
    began = time.monotonic()
    for number, case in enumerate(cases.random_cases(SEED, RANDOM)):
        try:
            await survives(case, monkeypatch)
        except BaseException:
            print(f"case {number} of AMIG_FAULT_SEED={SEED}: {case}, after {time.monotonic() - began:.0f} s")
            raise


async def test_the_harness_notices_a_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that lets its guest run on after COMMIT is what this is all about: is it seen?"""
    from amig.host.hosted import HostedGuest

    commit = HostedGuest._commit

    def forgetful(self: HostedGuest, record) -> None:  # type: ignore[no-untyped-def]
        commit(self, record)
        self.machine.resume()

    lost = Case(Send("destination", "committed", cases.F.RUNNING), Action.CUT, Position.BEFORE, "move")
    with monkeypatch.context() as own:
        own.setattr(HostedGuest, "_commit", forgetful)
        with pytest.raises(AssertionError, match="two copies"):
            async with world(own, lost) as here:
                await play(here, lambda w: SCENARIOS["move"](w, own))
