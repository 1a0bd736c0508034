"""The hub's promises: design rules 1 to 6 and 9 as far as they concern the log, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import pytest

from amig import bitmap
from amig.dirty.hub import MAX_USERS, DirtyLogHub, HubUser
from amig.dirty.log import LogAbilities
from amig.dirty.registry import strategies
from amig.errors import ControlError, KvmError, UsageError
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot, Words
from amig.sim.kernel_log import SimKernelLog

MODERN = LogAbilities(manual_clear=True, initially_set=True)
ZEROS_FIRST = LogAbilities(manual_clear=True, initially_set=False)
OLD = LogAbilities(manual_clear=False, initially_set=False)
SAFE = ("auto-clear", "slot-cache", "exact")


def slot(index: int, region: int, first: int, pages: int, phys: int | None = None) -> Slot:
    where = (index << 32) if phys is None else phys
    return Slot(index=index, guest_phys=where, size=pages * PAGE_SIZE, region=region, offset=first * PAGE_SIZE)


def memory_map(*slots: Slot, pages: int = 300, generation: int = 1, regions: int = 1) -> MemoryMap:
    return MemoryMap(
        generation=generation,
        regions=tuple(Region(id=i, size=pages * PAGE_SIZE) for i in range(regions)),
        slots=slots,
    )


class SpyLog(SimKernelLog):
    """The model, writing down what was asked of it, and failing on request."""

    def __init__(self, memory_map: MemoryMap, abilities: LogAbilities = MODERN) -> None:
        super().__init__(memory_map, abilities)
        self.calls: list[tuple[object, ...]] = []
        self.fail: Callable[[str, int], bool] = lambda call, slot: False
        self.before_clear: Callable[[], None] = lambda: None

    def _note(self, call: str, slot: int, *more: object) -> None:
        self.calls.append((call, slot, *more))
        if self.fail(call, slot):
            raise KvmError(f"{call} failed on purpose", request=call, errno=5)

    def start(self, slot: int, *, manual: bool) -> None:
        self._note("start", slot, manual)
        super().start(slot, manual=manual)

    def stop(self, slot: int) -> None:
        super().stop(slot)
        self._note("stop", slot)

    def get(self, slot: int, out: Words) -> None:
        super().get(slot, out)
        self._note("get", slot)

    def clear(self, slot: int, first: int, count: int, words: Words) -> None:
        self.before_clear()
        self._note("clear", slot, first, count, bitmap.to_pages(words, first).tolist())
        super().clear(slot, first, count, words)

    def named(self, call: str) -> list[tuple[object, ...]]:
        return [entry for entry in self.calls if entry[0] == call]

    def dirty(self, slot: int) -> list[int]:
        words = self.peek(slot)
        assert words is not None
        return pages_of(words)


def one_slot(
    abilities: LogAbilities = MODERN, pages: int = 300, strategy: str | None = None, users: int = 1
) -> tuple[SpyLog, DirtyLogHub, list[HubUser]]:
    layout = memory_map(slot(0, 0, 0, pages), pages=pages)
    log = SpyLog(layout, abilities)
    hub = DirtyLogHub(log, layout)
    unsafe = strategy is not None and strategies[strategy].unsafe
    opened = [hub.open("first", strategy, unsafe=unsafe)] + [hub.open(f"user {i}") for i in range(1, users)]
    return log, hub, opened


def pages_of(words: Words, first: int = 0) -> list[int]:
    return cast(list[int], bitmap.to_pages(words, first).tolist())


def take_all(user: HubUser, hub: DirtyLogHub, region: int = 0) -> list[int]:
    pages = hub.map.region(region).pages
    return pages_of(user.take_and_clear(region, 0, pages, hub.map.generation))


@contextmanager
def refused(code: str) -> Iterator[None]:
    with pytest.raises(ControlError) as caught:
        yield
    assert caught.value.code == code


# Joining and leaving.


@pytest.mark.parametrize("abilities", [MODERN, ZEROS_FIRST, OLD])
def test_everything_is_pending_for_a_new_user_and_for_one_that_joins_later(abilities: LogAbilities) -> None:
    _log, hub, (first,) = one_slot(abilities)
    assert take_all(first, hub) == list(range(300))
    assert take_all(first, hub) == []
    second = hub.open("second")
    assert pages_of(second.sync()[0]) == list(range(300))
    assert take_all(second, hub) == list(range(300))


def test_all_logs_are_on_before_any_is_read() -> None:
    layout = memory_map(slot(0, 0, 0, 100), slot(1, 0, 100, 200))
    log = SpyLog(layout)
    DirtyLogHub(log, layout).open("x")
    assert [(call[0], call[1]) for call in log.calls] == [("start", 0), ("start", 1), ("get", 0), ("get", 1)]


def test_the_best_strategy_is_taken_and_offered_first() -> None:
    for abilities, names in ((MODERN, ("exact", "slot-cache", "auto-clear")), (OLD, ("auto-clear",))):
        log, hub, (user,) = one_slot(abilities)
        assert hub.offered == names
        assert hub.strategy == names[0] == user.started.strategy
        assert user.started.initially_set == abilities.initially_set
        assert user.started.generation == 1
        assert log.named("start") == [("start", 0, abilities.manual_clear)]


def test_the_first_user_sets_the_strategy() -> None:
    _log, hub, (first,) = one_slot(strategy="auto-clear")
    assert hub.open("joins").started.strategy == "auto-clear"
    assert hub.open("asks for the same", "auto-clear").started.strategy == "auto-clear"
    with refused("strategy-in-use"):
        hub.open("asks for another", "slot-cache")
    assert [user.name for user in hub.users] == ["first", "joins", "asks for the same"]
    assert first.started.strategy == "auto-clear"


def test_the_next_first_user_may_set_another() -> None:
    log, hub, (first,) = one_slot(strategy="auto-clear")
    first.close()
    assert hub.strategy is None
    assert hub.open("again", "slot-cache").started.strategy == "slot-cache"
    assert log.named("start") == [("start", 0, False), ("start", 0, True)]


def test_what_the_kernel_lacks_is_refused_by_name() -> None:
    log, hub, _users = one_slot(OLD)
    for name in ("slot-cache", "exact", "no-such-thing"):
        with refused("unsupported"):
            hub.open("x", name)
    assert len(log.named("start")) == 1


def test_strategies_that_lose_pages_have_to_be_allowed() -> None:
    layout = memory_map(slot(0, 0, 0, 300))
    log = SpyLog(layout)
    hub = DirtyLogHub(log, layout)
    for name in ("blind", "migration-bitmap"):
        with refused("unsafe"):
            hub.open("x", name)
        assert log.calls == []
        user = hub.open("x", name, unsafe=True)
        assert hub.strategy == name
        user.close()
        log.calls.clear()


def test_there_is_one_exact_user_and_others_join_without_asking() -> None:
    _log, hub, (first,) = one_slot(strategy="exact")
    hub.open("meter")
    with refused("busy"):
        hub.open("second migration", "exact")
    assert [user.exact for user in hub.users] == [True, False]
    first.close()
    assert hub.open("next migration", "exact").started.strategy == "exact"


def test_a_migration_may_join_a_log_that_a_meter_has_switched_on() -> None:
    log, hub, (meter,) = one_slot()
    assert hub.strategy == "exact"
    assert [user.exact for user in hub.users] == [False], "who watches leaves the place to a migration"
    take_all(meter, hub)
    migration = hub.open("migration", "exact")
    assert [user.exact for user in hub.users] == [False, True]
    take_all(migration, hub)
    assert len(take_all(meter, hub)) == 300, "owed: what it cleared may have been news"
    log.guest_write(0, [3])
    hub.mark(0, 3, 1)
    assert take_all(meter, hub) == [3]
    assert take_all(migration, hub) == [3]
    assert log.dirty(0) == []
    assert take_all(meter, hub) == [3], "owed"
    assert len(log.named("start")) == 1


@pytest.mark.parametrize("first", ["slot-cache", "exact"])
@pytest.mark.parametrize("then", ["slot-cache", "exact"])
def test_a_log_goes_over_to_what_a_migration_names_while_nobody_is_exact(first: str, then: str) -> None:
    log, hub, (meter,) = one_slot(strategy="slot-cache")
    if first == "exact":
        hub.open("first migration", "exact").close()
    assert hub.strategy == first
    take_all(meter, hub)
    log.guest_write(0, [5])
    meter.sync()
    migration = hub.open("migration", then)
    assert hub.strategy == then == migration.started.strategy == meter.started.strategy
    log.guest_write(0, [6])
    take_all(migration, hub)
    assert log.dirty(0) == ([] if then == "exact" else [6])
    migration.sync()
    assert {5, 6} <= set(take_all(meter, hub))
    assert take_all(migration, hub) == ([] if then == "exact" else [6])


def test_a_log_does_not_go_over_under_its_exact_user_or_to_what_keeps_no_cache() -> None:
    _log, hub, (_migration,) = one_slot(strategy="exact")
    for name in ("slot-cache", "auto-clear"):
        with refused("strategy-in-use"):
            hub.open("second migration", name)
    _log, hub, (_meter,) = one_slot(strategy="auto-clear")
    for name in ("slot-cache", "exact"):
        with refused("strategy-in-use"):
            hub.open("migration", name)
    assert hub.strategy == "auto-clear"


def test_nobody_joins_by_name_what_loses_pages_without_allowing_it() -> None:
    _log, hub, _users = one_slot(strategy="migration-bitmap")
    with refused("unsafe"):
        hub.open("second", "migration-bitmap")
    assert hub.open("second", "migration-bitmap", unsafe=True).started.strategy == "migration-bitmap"


def test_users_are_bounded() -> None:
    _log, hub, _users = one_slot(users=MAX_USERS)
    with refused("busy"):
        hub.open("one too many")


def test_the_last_user_switches_logging_off_everywhere_even_after_errors() -> None:
    layout = memory_map(slot(0, 0, 0, 100), slot(1, 0, 100, 200))
    log = SpyLog(layout)
    hub = DirtyLogHub(log, layout)
    first, second = hub.open("a"), hub.open("b")
    first.close()
    assert log.named("stop") == []
    log.fail = lambda call, slot: call == "stop" and slot == 0
    with pytest.raises(KvmError, match="on purpose"):
        second.close()
    assert log.named("stop") == [("stop", 0), ("stop", 1)]
    second.close()
    first.close()
    assert len(log.named("stop")) == 2
    assert hub.strategy is None
    assert hub.users == ()


@pytest.mark.parametrize("failing", ["start", "get"])
def test_a_log_that_can_not_be_switched_on_is_off_everywhere(failing: str) -> None:
    layout = memory_map(slot(0, 0, 0, 100), slot(1, 0, 100, 200))
    log = SpyLog(layout)
    hub = DirtyLogHub(log, layout)
    log.fail = lambda call, slot: call == failing and slot == 1
    with pytest.raises(KvmError):
        hub.open("x")
    assert (log.peek(0), log.peek(1)) == (None, None)
    assert hub.strategy is None
    log.fail = lambda call, slot: call == "stop" or (call == failing and slot == 1)
    with pytest.raises(KvmError, match=failing) as caught:
        hub.open("x")
    assert "off again failed" in caught.value.__notes__[0]
    log.fail = lambda call, slot: False
    assert len(take_all(hub.open("x"), hub)) == 300


def test_who_has_left_gets_nothing() -> None:
    _log, hub, (first, second) = one_slot(users=2)
    taken = first.take_and_clear(0, 0, 64, 1)
    first.close()
    for call in (first.sync, lambda: first.take_and_clear(0, 0, 64, 1), lambda: first.started):
        with refused("not-a-user"):
            call()
    first.give_back(0, 0, taken)
    assert take_all(second, hub) == list(range(300))


# What is dirty reaches every user, once.


@pytest.mark.parametrize("strategy", SAFE)
def test_a_write_reaches_every_user_once(strategy: str) -> None:
    log, hub, users = one_slot(ZEROS_FIRST, strategy=strategy, users=3)
    for user in users:
        take_all(user, hub)
    log.guest_write(0, [5, 64, 299])
    assert pages_of(users[1].sync()[0]) == [5, 64, 299]
    for user in users:
        assert take_all(user, hub) == [5, 64, 299]
        assert take_all(user, hub) == []
        assert pages_of(user.sync()[0]) == []


@pytest.mark.parametrize("strategy", SAFE)
def test_a_write_after_the_take_comes_again(strategy: str) -> None:
    log, hub, users = one_slot(strategy=strategy, users=2)
    for user in users:
        user.sync()
        take_all(user, hub)
    log.guest_write(0, [7])
    users[0].sync()
    assert take_all(users[0], hub) == [7]
    log.guest_write(0, [7])
    users[0].sync()
    assert take_all(users[0], hub) == [7]
    assert take_all(users[1], hub) == [7]


def test_a_sync_is_a_copy_and_takes_nothing() -> None:
    log, hub, (user,) = one_slot()
    take_all(user, hub)
    log.guest_write(0, [3])
    copy = user.sync()[0]
    copy[:] = 0
    assert take_all(user, hub) == [3]


def test_a_sync_can_be_made_into_buffers_given() -> None:
    _log, _hub, (user,) = one_slot()
    buffer = np.zeros(5, dtype=np.uint64)
    assert user.sync({0: buffer})[0] is buffer
    assert bitmap.count(buffer) == 300
    for wrong in ({}, {0: np.zeros(4, dtype=np.uint64)}):
        with refused("bad-range"):
            user.sync(wrong)


def test_only_the_range_asked_for_is_taken() -> None:
    _log, hub, (user,) = one_slot()
    assert pages_of(user.take_and_clear(0, 64, 128, 1), 64) == list(range(64, 192))
    assert pages_of(user.take_and_clear(0, 10, 100, 1), 10) == list(range(10, 64))
    assert take_all(user, hub) == [*range(10), *range(192, 300)]


@pytest.mark.parametrize(("first", "count"), [(0, 301), (-64, 64), (300, 1), (0, 0), (64, -64), (0, 1 << 40)])
def test_ranges_outside_of_the_region_are_refused(first: int, count: int) -> None:
    _log, hub, (user,) = one_slot()
    with refused("bad-range"):
        user.take_and_clear(0, first, count, 1)
    with refused("bad-range"):
        hub.mark(0, first, count)
    with refused("bad-range"):
        user.take_and_clear(7, 0, 64, 1)


def test_marks_from_the_host_reach_every_user() -> None:
    _log, hub, users = one_slot(users=2)
    for user in users:
        take_all(user, hub)
    hub.mark(0, 60, 10)
    for user in users:
        assert take_all(user, hub) == list(range(60, 70))
    assert hub.counters.pages_marked == 10
    for user in users:
        user.close()
    hub.mark(0, 0, 300)
    assert hub.counters.pages_marked == 10


# The rules.


@pytest.mark.parametrize("strategy", ["slot-cache", "exact"])
def test_rule_1_bits_are_clear_in_the_kernel_when_take_returns(strategy: str) -> None:
    log, _hub, (user,) = one_slot(strategy=strategy)
    seen = []
    log.before_clear = lambda: seen.append(log.dirty(0) == list(range(300)))
    assert pages_of(user.take_and_clear(0, 0, 128, 1)) == list(range(128))
    assert seen == [True]
    assert log.dirty(0) == list(range(128, 300))
    log.guest_write(0, [5])  # while the pages are being read
    user.sync()
    assert pages_of(user.take_and_clear(0, 0, 128, 1)) == [5]


@pytest.mark.parametrize("abilities", [MODERN, ZEROS_FIRST])
@pytest.mark.parametrize("strategy", ["slot-cache", "exact", "migration-bitmap", "blind"])
def test_rule_2_nothing_is_cleared_before_the_first_get(abilities: LogAbilities, strategy: str) -> None:
    log, hub, (user,) = one_slot(abilities, strategy=strategy)
    take_all(user, hub)
    order = [call[0] for call in log.calls]
    assert order.index("get") < (order.index("clear") if "clear" in order else len(order))


def test_rule_2_slot_cache_clears_only_what_every_user_was_given() -> None:
    log, hub, (first, second) = one_slot(strategy="slot-cache", users=2)
    take_all(first, hub)
    take_all(second, hub)
    log.guest_write(0, [1])
    first.sync()
    log.guest_write(0, [2])  # unknown to user space
    hub.mark(0, 2, 1)  # but pending from another source
    assert take_all(first, hub) == [1, 2]
    assert log.dirty(0) == [2]
    second.sync()
    assert take_all(second, hub) == [1, 2]


def test_rule_2_exact_clears_all_that_it_takes_and_owes_it_to_the_others() -> None:
    log, hub, (first, second) = one_slot(strategy="exact", users=2)
    take_all(first, hub)
    take_all(second, hub)
    log.guest_write(0, [2])
    hub.mark(0, 2, 1)
    assert take_all(second, hub) == [2]  # takes the mark, clears nothing: it is not the exact user
    assert log.dirty(0) == [2]
    assert take_all(first, hub) == [2]
    assert log.dirty(0) == []
    assert take_all(second, hub) == [2], "the clear of the exact user hid this write: it is owed"
    first.sync()
    assert take_all(first, hub) == [], "and no needless copy"


def test_rule_2_a_stale_bit_of_one_user_does_not_clear_the_news_of_another() -> None:
    """Peter Xu's trace against D3: here with D2 and D4."""
    for strategy in ("slot-cache", "exact"):
        log, hub, (migration, display) = one_slot(strategy=strategy, users=2)
        migration.sync()
        take_all(migration, hub)
        log.guest_write(0, [9])
        take_all(display, hub)  # has a bit for 9, older than this write
        migration.sync()
        assert take_all(migration, hub) == [9]


@pytest.mark.parametrize("strategy", ["slot-cache", "exact"])
@pytest.mark.parametrize(("first", "count"), [(10, 20), (60, 10), (3, 297), (64, 1), (0, 300), (130, 62)])
def test_rule_3_rounding_clears_nothing_outside_of_an_unaligned_range(strategy: str, first: int, count: int) -> None:
    log, hub, (user,) = one_slot(strategy=strategy)
    user.take_and_clear(0, first, count, 1)
    inside = set(range(first, first + count))
    assert log.dirty(0) == sorted(set(range(300)) - inside)
    assert take_all(user, hub) == sorted(set(range(300)) - inside)
    for _call, _slot, begin, length, _pages in log.named("clear"):
        assert isinstance(begin, int)
        assert isinstance(length, int)
        assert begin % 64 == 0
        assert length % 64 == 0 or begin + length == 300


@pytest.mark.parametrize("offset", [0, 1, 37, 63, 64, 100])
def test_rule_3_slots_may_start_at_any_page_of_their_region(offset: int) -> None:
    layout = memory_map(slot(3, 0, offset, 150), slot(5, 0, offset + 150, 300 - offset - 150))
    log = SpyLog(layout)
    hub = DirtyLogHub(log, layout)
    user = hub.open("x")
    assert pages_of(user.take_and_clear(0, 128, 64, 1), 128) == list(range(128, 192))
    region = [page + offset for page in log.dirty(3)] + [page + offset + 150 for page in log.dirty(5)]
    assert region == [page for page in range(offset, 300) if not 128 <= page < 192]
    take_all(user, hub)
    assert log.dirty(3) == log.dirty(5) == []
    log.guest_write(3, [0, 70, 149])
    log.guest_write(5, [0, 44])
    written = [offset, offset + 70, offset + 149, offset + 150, offset + 194]
    assert pages_of(user.sync()[0]) == written
    assert take_all(user, hub) == written
    assert pages_of(user.sync()[0]) == []


@pytest.mark.parametrize("strategy", SAFE)
@pytest.mark.parametrize("offset", [0, 64, 13])
def test_rule_4_a_mark_or_a_clear_concerns_every_alias(strategy: str, offset: int) -> None:
    """The same memory through two slots, the second shifted against the first."""
    layout = memory_map(slot(0, 0, 0, 200), slot(1, 0, offset, 200))
    log = SpyLog(layout)
    hub = DirtyLogHub(log, layout)
    user = hub.open("x", strategy)
    take_all(user, hub)
    assert log.dirty(0) == log.dirty(1) == []
    log.guest_write(0, [offset + 5])
    log.guest_write(1, [5, 6])
    assert pages_of(user.sync()[0]) == [offset + 5, offset + 6]
    assert pages_of(user.take_and_clear(0, 0, 300, 1)) == [offset + 5, offset + 6]
    assert log.dirty(0) == log.dirty(1) == []
    assert pages_of(user.sync()[0]) == []


def test_rule_4_memory_that_no_slot_shows_is_sent_once() -> None:
    layout = memory_map(slot(0, 0, 100, 50))
    log = SpyLog(layout)
    hub = DirtyLogHub(log, layout)
    user = hub.open("x")
    assert take_all(user, hub) == list(range(300))
    assert pages_of(user.sync()[0]) == []
    hub.mark(0, 10, 1)
    assert take_all(user, hub) == [10]


def changed(hub: DirtyLogHub, log: SpyLog, layout: MemoryMap, *replaced: int) -> None:
    with hub.changing():
        log.set_slots(layout, replaced=replaced)
        hub.slots_changed(layout)


@pytest.mark.parametrize("abilities", [MODERN, ZEROS_FIRST])
def test_rule_5_a_take_for_an_older_map_is_refused(abilities: LogAbilities) -> None:
    log, hub, (user,) = one_slot(abilities)
    changed(hub, log, memory_map(slot(0, 0, 0, 300), slot(1, 1, 0, 300), generation=2, regions=2))
    clears = len(log.named("clear"))
    with refused("stale-generation"):
        user.take_and_clear(0, 0, 64, 1)
    assert len(log.named("clear")) == clears
    assert user.started.generation == 2
    assert len(user.take_and_clear(0, 0, 64, 2)) == 1


def test_rule_5_a_slot_that_comes_is_logged_and_pending() -> None:
    log, hub, users = one_slot(ZEROS_FIRST, users=2)
    for user in users:
        take_all(user, hub)
    changed(hub, log, memory_map(slot(0, 0, 0, 300), slot(1, 1, 0, 300), generation=2, regions=2))
    assert take_all(users[0], hub) == []
    for user in users:
        assert take_all(user, hub, 1) == list(range(300))
    log.guest_write(1, [42])
    assert pages_of(users[0].sync()[1]) == [42]
    for user in users:
        user.close()
    assert log.peek(1) is None


def test_rule_5_what_the_kernel_knew_of_a_slot_that_goes_is_not_lost() -> None:
    log, hub, (user,) = one_slot()
    take_all(user, hub)
    log.guest_write(0, [77])  # nobody has asked for it yet
    changed(hub, log, memory_map(slot(1, 0, 250, 50), generation=2))
    assert 77 in take_all(user, hub)


@pytest.mark.parametrize("strategy", ["slot-cache", "exact"])
def test_rule_5_the_cache_dies_with_its_slot(strategy: str) -> None:
    """A slot replaced by one of the same shape: what C said of the old one must clear nothing in the new one."""
    log, hub, users = one_slot(ZEROS_FIRST, strategy=strategy, users=2)
    for user in users:
        take_all(user, hub)
    log.guest_write(0, [8])
    users[0].sync()  # C has 8
    changed(hub, log, memory_map(slot(0, 0, 0, 300, 1 << 40), generation=2), 0)
    clears = len(log.named("clear"))
    assert take_all(users[1], hub) == list(range(300))
    assert strategy == "exact" or len(log.named("clear")) == clears, "nothing is known of the new slot yet"
    take_all(users[0], hub)
    log.guest_write(0, [8])
    users[1].give_back(0, 0, bitmap.from_pages([8], 64))
    take_all(users[1], hub)  # must not clear a bit that the first user has never seen
    users[0].sync()
    assert take_all(users[0], hub) == [8]


def test_rule_5_regions_grow_shrink_and_go() -> None:
    before = memory_map(slot(0, 0, 0, 300), slot(1, 1, 0, 300), regions=2)
    log = SpyLog(before)
    hub = DirtyLogHub(log, before)
    user = hub.open("x")
    taken = user.take_and_clear(0, 0, 300, 1)
    take_all(user, hub, 1)
    changed(hub, log, memory_map(slot(0, 0, 0, 400), pages=400, generation=2))
    assert set(user.sync()) == {0}
    assert take_all(user, hub) == list(range(400))
    with refused("bad-range"):
        user.take_and_clear(1, 0, 64, 2)
    user.give_back(1, 0, taken)
    changed(hub, log, memory_map(slot(0, 0, 0, 100), pages=100, generation=3))
    assert take_all(user, hub) == list(range(100))
    user.give_back(0, 0, taken)
    user.give_back(0, 128, taken)
    assert take_all(user, hub) == list(range(100))


def test_rule_5_a_failure_to_log_a_new_slot_is_told_to_everyone() -> None:
    log, hub, (user,) = one_slot()
    log.fail = lambda call, slot: call == "start" and slot == 1
    after = memory_map(slot(0, 0, 0, 300), slot(1, 1, 0, 300), generation=2, regions=2)
    log.set_slots(after)
    with pytest.raises(KvmError):
        hub.slots_changed(after)
    for call in (user.sync, lambda: user.take_and_clear(0, 0, 64, 2), lambda: hub.open("another")):
        with refused("log-failed"):
            call()
    user.close()
    log.fail = lambda call, slot: False
    assert len(take_all(hub.open("fresh"), hub, 1)) == 300


def test_rule_5_maps_only_go_forward() -> None:
    log, hub, (user,) = one_slot()
    with pytest.raises(UsageError, match="higher generation"):
        hub.slots_changed(memory_map(slot(0, 0, 0, 300)))
    user.close()
    changed(hub, log, memory_map(slot(0, 0, 0, 300), generation=2))
    assert hub.map.generation == 2
    assert len(take_all(hub.open("x"), hub)) == 300


@pytest.mark.parametrize("strategy", SAFE)
def test_rule_6_a_page_that_is_taken_and_skipped_does_not_come_back(strategy: str) -> None:
    log, hub, (user,) = one_slot(strategy=strategy)
    user.sync()
    take_all(user, hub)  # and sends none of them
    for _ in range(3):
        user.sync()
        assert take_all(user, hub) == []
    assert log.dirty(0) == []


@pytest.mark.parametrize("strategy", SAFE)
def test_rule_9_bits_given_back_are_pending_again_for_that_user_only(strategy: str) -> None:
    log, hub, users = one_slot(strategy=strategy, users=2)
    for user in users:
        user.sync()
        take_all(user, hub)
    log.guest_write(0, [70, 80])
    users[0].sync()
    taken = users[0].take_and_clear(0, 64, 64, 1)
    log.guest_write(0, [90])
    users[0].give_back(0, 64, taken)
    users[0].sync()
    assert take_all(users[0], hub) == [70, 80, 90]
    assert take_all(users[1], hub) == [70, 80, 90]


def test_rule_9_bits_given_back_from_an_unaligned_range_land_where_they_were() -> None:
    _log, hub, (user,) = one_slot()
    taken = user.take_and_clear(0, 37, 100, 1)
    user.give_back(0, 37, taken)
    assert take_all(user, hub) == list(range(300))
    with refused("bad-range"):
        user.give_back(0, -1, taken)


@pytest.mark.parametrize("strategy", ["slot-cache", "exact"])
def test_rule_9_a_clear_that_fails_half_way_loses_nothing(strategy: str) -> None:
    layout = memory_map(slot(0, 0, 0, 150), slot(1, 0, 150, 150))
    log = SpyLog(layout)
    hub = DirtyLogHub(log, layout)
    users = [hub.open("a", strategy), hub.open("b")]
    for user in users:
        take_all(user, hub)
    log.guest_write(0, [1])
    log.guest_write(1, [1])
    users[0].sync()
    hub.mark(0, 7, 1)
    assert take_all(users[1], hub) == [1, 7, 151]
    log.guest_write(0, [7])
    log.guest_write(1, [1])
    users[1].sync()
    log.fail = lambda call, slot: call == "clear" and slot == 1
    with pytest.raises(KvmError):
        take_all(users[0], hub)
    log.fail = lambda call, slot: False
    log.guest_write(0, [1])
    for user in users:
        user.sync()
        assert {1, 7, 151} >= set(take_all(user, hub)) >= {7, 151}
    users[0].sync()
    assert set(take_all(users[0], hub)) <= {1, 7, 151}


def test_rule_9_a_get_that_fails_in_automatic_mode_may_have_cleared() -> None:
    log, hub, (user,) = one_slot(OLD)
    take_all(user, hub)
    log.guest_write(0, [5])
    log.fail = lambda call, slot: call == "get"
    with pytest.raises(KvmError):
        user.sync()
    log.fail = lambda call, slot: False
    assert 5 in take_all(user, hub)


def test_rule_10_nothing_to_clear_is_no_ioctl_and_a_range_is_one_per_slot() -> None:
    log, hub, (user,) = one_slot(pages=64 * 1000)
    take_all(user, hub)
    assert len(log.named("clear")) == 1
    take_all(user, hub)
    assert len(log.named("clear")) == 1
    counters = hub.counters
    assert (counters.clears, counters.pages_cleared, counters.takes) == (1, 64000, 2)
    assert counters.pages_taken == 64000
    assert (counters.gets, counters.syncs) == (1, 0)


def test_status_shows_users_and_what_they_are_owed() -> None:
    log, hub, (first, _second) = one_slot(users=2)
    take_all(first, hub)
    log.guest_write(0, [1, 2])
    first.sync()
    assert [(user.name, user.pending, user.taken) for user in hub.users] == [("first", 2, 300), ("user 1", 300, 0)]


def test_a_take_is_one_step_for_everybody_else() -> None:
    log, hub, (first, second) = one_slot(users=2)
    calls: list[Callable[[], object]] = [
        lambda: hub.mark(0, 0, 1),
        second.sync,
        lambda: second.take_and_clear(0, 0, 64, 1),
        lambda: second.give_back(0, 0, bitmap.ones(64)),
        lambda: hub.users,
        lambda: hub.open("third"),
        second.close,
    ]
    threads = [threading.Thread(target=call) for call in calls]
    alive: list[bool] = []

    def meanwhile() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.02)  # one that is let in would be through long before
        alive.extend(thread.is_alive() for thread in threads)
        log.before_clear = lambda: None

    log.before_clear = meanwhile
    assert len(pages_of(first.take_and_clear(0, 0, 64, 1))) == 64
    for thread in threads:
        thread.join()
    assert alive == [True] * len(calls)


def test_users_in_threads_lose_nothing() -> None:
    """Every page written is taken by both users at least as late as its last write, whoever clears."""
    layout = memory_map(slot(0, 0, 0, 1000), slot(1, 0, 37, 900), pages=1000)
    log = SimKernelLog(layout)
    hub = DirtyLogHub(log, layout)
    users = [hub.open("a", "exact"), hub.open("b")]
    memory = np.zeros(1000, dtype=np.int64)
    copies = [np.full(1000, -1, dtype=np.int64) for _ in users]
    done = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        rng = np.random.default_rng(5)
        for generation in range(1, 1500):
            pages = rng.integers(0, 900, 8)
            with log.atomically():
                alias = generation % 2
                memory[pages + 37 * alias] = generation
                log.guest_write(alias, pages)
        done.set()

    def read(user: HubUser, copy: np.ndarray) -> None:
        try:
            last = False
            while not last:
                last = done.is_set()
                user.sync()
                for first in range(0, 1000, 100):
                    pages = bitmap.to_pages(user.take_and_clear(0, first, 100, 1), first)
                    copy[pages] = memory[pages]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write)]
    threads += [threading.Thread(target=read, args=pair) for pair in zip(users, copies, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for copy in copies:
        assert np.array_equal(copy, memory)
