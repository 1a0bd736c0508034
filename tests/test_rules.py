"""The eleven rules of the design, each with the tests that guard it, and what was not guarded elsewhere.

`GUARDS` is the index: for every rule the tests that fail when it is broken, as file and beginning of the test's name.
The model's own search breaks rules too, one after the other (`tests/test_prove.py`).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from amig import bitmap
from amig.memory import Region
from amig.policy import Policy
from amig.stages.dirty_sync import DirtySync
from amig.stages.ledger import Ledger
from amig.stats import LinkMeter
from tests.modelguest import ModelGuest
from tests.test_pipeline import MANY_ROUNDS, PAGES, Rounds, migrate

GUARDS: dict[int, tuple[tuple[str, str], ...]] = {
    1: (
        ("test_hub", "test_rule_1_"),
        ("test_pipeline", "test_the_comparison_bites_a_clear_after_the_read_loses_pages"),
        ("test_migrate", "test_the_guest_reports_clears_that_come_after_the_read"),
        ("test_dirty_strategies", "test_"),
        ("test_prove", "test_every_rule_is_there_for_a_reason"),
    ),
    2: (
        ("test_hub", "test_rule_2_nothing_is_cleared_before_the_first_get"),
        ("test_hub", "test_rule_2_slot_cache_clears_only_what_every_user_was_given"),
        ("test_hub", "test_rule_2_exact_clears_all_that_it_takes_and_owes_it_to_the_others"),
        ("test_slots", "test_rule_2_what_no_sync_has_named_is_not_cleared"),
        ("test_slots", "test_rule_2_a_log_that_starts_all_set"),
        ("test_meter", "test_what_an_exact_user_cleared_is_only_possibly_dirty"),
    ),
    3: (
        ("test_hub", "test_rule_3_rounding_clears_nothing_outside_of_an_unaligned_range"),
        ("test_hub", "test_rule_3_slots_may_start_at_any_page_of_their_region"),
        ("test_slots", "test_rule_3_an_unaligned_take"),
        ("test_slots", "test_rule_3_a_slot_that_starts_anywhere"),
    ),
    4: (
        ("test_hub", "test_rule_4_a_mark_or_a_clear_concerns_every_alias"),
        ("test_slots", "test_rule_4_a_page_seen_twice_is_one_page"),
        ("test_vhost", "test_the_hub_hands_what_others_logged_to_every_user"),
    ),
    5: (
        ("test_hub", "test_rule_5_a_take_for_an_older_map_is_refused"),
        ("test_hub", "test_rule_5_the_cache_dies_with_its_slot"),
        ("test_slots", "test_rule_5_what_was_written_through_a_slot_that_goes"),
        ("test_slots", "test_rule_5_a_slot_that_comes_is_logged"),
        ("test_slots", "test_rule_5_a_slot_that_is_resized"),
        ("test_slots", "test_rule_5_the_same_slot_at_another_place"),
        ("test_slots", "test_rule_5_logging_off_and_on_again"),
    ),
    6: (
        ("test_hub", "test_rule_6_a_page_that_is_taken_and_skipped_does_not_come_back"),
        ("test_rules", "test_rule_6_"),
    ),
    7: (
        ("test_ring", "test_a_sync_leaves_pages_writable_and_a_take_protects_them_again"),
        ("test_ring", "test_nothing_is_lost_whatever_the_order"),
        ("test_ring", "test_the_search_above_finds_what_is_wrong"),
        ("test_ring", "test_what_a_guest_writes_is_harvested_from_a_ring_of_any_size"),
        ("test_ring", "test_a_checking_guest_moves_intact_by_ring"),
    ),
    8: (
        ("test_pipeline", "test_memory_written_by_saving_the_state_is_sent_too"),
        ("test_rules", "test_rule_8_"),
    ),
    9: (
        ("test_hub", "test_rule_9_bits_given_back_are_pending_again"),
        ("test_hub", "test_rule_9_a_clear_that_fails_half_way_loses_nothing"),
        ("test_guest_seam", "test_a_cancelled_take_gives_its_bits_back"),
        ("test_rules", "test_rule_9_"),
        ("test_ring", "test_nothing_is_lost_whatever_the_order"),
    ),
    10: (
        ("test_hub", "test_rule_10_nothing_to_clear_is_no_ioctl_and_a_range_is_one_per_slot"),
        ("test_rules", "test_rule_10_"),
    ),
    11: (("test_rules", "test_rule_11_"),),
}


@pytest.mark.parametrize("rule", GUARDS)
def test_the_guards_of_every_rule_exist(rule: int) -> None:
    here = Path(__file__).parent
    for file, name in GUARDS[rule]:
        text = (here / f"{file}.py").read_text()
        assert re.search(rf"^(async )?def {name}", text, re.MULTILINE), f"rule {rule}: {file}.py has no {name}…"


def test_all_eleven_rules_are_guarded() -> None:
    assert set(GUARDS) == set(range(1, 12))


# Rule 6: a page deliberately skipped counts as sent.


def with_holes() -> tuple[ModelGuest, Rounds]:
    """A guest of which the second half is holes; it writes one page in each round."""
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES // 2))
    return guest, Rounds(on_start=lambda round_: guest.write([round_]) if "pause" not in guest.calls else None)


async def test_rule_6_holes_and_zero_pages_are_taken_with_the_first_round_and_stay_away() -> None:
    guest, rounds = with_holes()
    guest.write(np.arange(0, PAGES // 2, 2), zero=True)
    run = await migrate(guest, MANY_ROUNDS, rounds=rounds)
    run.assert_equal()
    assert all(planned <= 2 for planned in rounds.planned[1:]), rounds.planned


async def test_rule_6_broken_holes_come_back_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def skip_without_taking(self, region, words, present):  # type: ignore[no-untyped-def]
        wanted = words if present is None else words & present
        return bitmap.cut(wanted, 0, 64, None, pages=PAGES)

    monkeypatch.setattr(DirtySync, "_plan", skip_without_taking)
    guest, rounds = with_holes()
    await migrate(guest, MANY_ROUNDS, rounds=rounds)
    assert rounds.planned[1] > PAGES // 2 - 128


# Rule 8: once more after the device state was saved.


async def test_rule_8_broken_what_saving_wrote_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def save_last(self) -> None:  # type: ignore[no-untyped-def]
        self._on_pause()
        await self._guest.pause()
        self._paused = True
        await self._emit(await self._sync())
        self.state = await self._guest.save()

    monkeypatch.setattr(DirtySync, "_switch_over", save_last)
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    guest.on_save = lambda: guest.write([17, 18])
    run = await migrate(guest, Policy())
    with pytest.raises(AssertionError, match=r"pages that differ: \[17, 18\]"):
        run.assert_equal()


# Rule 9: taken bits are in flight until the peer has placed them.


def test_rule_9_pages_are_in_flight_until_their_round_is_placed() -> None:
    ledger = Ledger([Region(id=3, size=200 * 4096)])
    ledger.take(0, 3, 0, bitmap.from_pages([1, 2], 64))
    ledger.take(0, 3, 64, bitmap.from_pages([0], 64))
    ledger.take(1, 3, 0, bitmap.from_pages([2, 5], 64))
    assert bitmap.to_pages(ledger.in_flight()[3]).tolist() == [1, 2, 5, 64]
    ledger.all_taken(0)
    ledger.placed(0)
    assert bitmap.to_pages(ledger.in_flight()[3]).tolist() == [2, 5], "page 2 was sent again, and that is not placed"
    ledger.all_taken(1)
    ledger.placed(1)
    assert ledger.in_flight() == {}


async def test_rule_9_what_was_in_flight_when_a_connection_broke_goes_with_the_next_attempt() -> None:
    """Two pages were taken and sent into nothing: given back, the next round has them."""
    guest = ModelGuest(PAGES)
    guest.write(np.arange(PAGES))
    await guest.log_start("exact")
    ledger = Ledger(guest.array.map.regions)
    ledger.take(0, 0, 0, await guest.take_and_clear(0, 0, PAGES))
    ledger.all_taken(0)
    ledger.placed(0)
    guest.write([7, 2000])
    dirty = await guest.sync()
    ledger.take(1, 0, 0, await guest.take_and_clear(0, 0, PAGES))
    assert bitmap.to_pages(dirty[0]).tolist() == [7, 2000]
    for region, words in ledger.in_flight().items():
        await guest.give_back(region, 0, words)
    assert bitmap.to_pages((await guest.sync())[0]).tolist() == [7, 2000]
    await guest.log_stop()


# Rule 10: clears are batched.


@pytest.mark.parametrize("strategy", ["slot-cache", "exact"])
async def test_rule_10_a_migration_makes_one_clear_for_a_chunk_however_small_its_runs(strategy: str) -> None:
    guest = ModelGuest(PAGES)
    guest.write(np.arange(0, PAGES, 2))
    run = await migrate(guest, Policy(chunk=1 << 20, dirty_log=strategy))
    run.assert_equal()
    counters = guest.hub.counters
    assert counters.clears <= run.stats.chunks, "a chunk of many runs is one ioctl"
    assert counters.pages_cleared / counters.clears > 100


# Rule 11: the link is measured while it is really sending.


def test_rule_11_time_in_which_nothing_is_sent_does_not_make_the_link_look_slow() -> None:
    link, ms = LinkMeter(), 1_000_000
    now = 0
    for _ in range(10):
        link.begin(now)
        now += 10 * ms
        link.end(now, 10_000_000)
        now += 500 * ms  # scanning, a sync, a pause of the operator's
    assert link.bytes_per_s == pytest.approx(1e9)


def test_rule_11_connections_that_send_at_once_share_the_time() -> None:
    link, ms = LinkMeter(), 1_000_000
    link.begin(0)
    link.begin(0)
    link.end(10 * ms, 5_000_000)
    link.end(10 * ms, 5_000_000)
    assert link.bytes_per_s == pytest.approx(1e9, rel=0.1)
