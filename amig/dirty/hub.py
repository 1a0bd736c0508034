"""The one owner of GET and CLEAR of a guest, serving many users of its dirty log.

Every user (a migration, a dirty-rate meter, a display) has pending bits of its own, by region, and takes them at its
own pace. Which bits are cleared in the kernel is the strategy's decision; the first user sets the strategy.

One lock is held for each whole operation, ioctls included. So these are atomic against each other: a sync (GET of all
slots, handed to every user), a take (pending bits taken, cleared in the kernel, owed to the others), a mark, a change
of slots, joining and leaving. Guest writes are not held up: the kernel's log orders them.

What may go wrong leaves bits set that are clean, never the reverse.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from amig import bitmap
from amig.dirty.layout import Layout, start
from amig.dirty.ledger import Account, Ledger
from amig.dirty.log import ExternalLog, KernelLog
from amig.dirty.registry import best, interchangeable, obstacle, offered, strategies
from amig.dirty.strategy import Strategy
from amig.errors import ControlError, UsageError
from amig.guest import LogStarted
from amig.memory import PAGE_SIZE, WORD_PAGES, MemoryMap, Slot, Words

MAX_USERS = 16
"""Users of one log at a time; each costs a bitmap of the guest, and a second one once it has synced."""


@dataclass(slots=True, kw_only=True)
class LogCounters:
    """What the hub has done since it was made; times are in nanoseconds, of ioctls only."""

    syncs: int = 0
    gets: int = 0
    """GET ioctls, one for each slot and sync."""
    get_ns: int = 0
    takes: int = 0
    pages_taken: int = 0
    clears: int = 0
    """CLEAR ioctls."""
    clear_ns: int = 0
    pages_cleared: int = 0
    """Set bits given to CLEAR; a page seen through two slots counts once for each."""
    pages_marked: int = 0
    """By writes from the host's side."""
    pages_logged: int = 0
    """By other processes, in logs of their own; a page counts each time it is found there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogUserStatus:
    """One user of the log, for `amig status`."""

    name: str
    exact: bool
    """Whether the strategy treats it apart."""
    pending: int
    """Pages."""
    taken: int
    """Pages, in total."""


class HubUser:
    """One user's view of the hub (`amig.dirty.log.LogUser`). Made by `DirtyLogHub.open`; its calls block."""

    def __init__(self, hub: DirtyLogHub, account: Account) -> None:
        self._hub = hub
        self._account = account

    @property
    def started(self) -> LogStarted:
        """The strategy in force, and the generation of the map that a take has to name by now."""
        return self._hub.describe(self._account)

    def sync(self, into: Mapping[int, Words] | None = None) -> dict[int, Words]:
        """GET, hand the bits to every user, and return a copy of this user's pending bits by region.

        The copy is made into buffers that belong to this user, good until its next sync, or into ``into`` (an array of
        ``Region.words`` for each region) where the bits are needed elsewhere, as in shared memory. Raises
        `ControlError` (``not-a-user``, ``log-failed``, ``bad-range``) and `KvmError`; after an error nothing is lost.
        """
        return self._hub.sync(self._account, into)

    def take_and_clear(self, region: int, first: int, count: int, generation: int) -> Words:
        """Take the pending bits of a range and clear in the kernel what the strategy allows, as one atomic step.

        Returns a new bitmap whose bit 0 is page ``first``; the range needs no alignment. Only after it has returned may
        the pages be read (design rule 1). Raises `ControlError` with code ``stale-generation`` when slots have changed
        since ``generation``, ``bad-range``, ``not-a-user``, ``log-failed``; and `KvmError`, which leaves the bits
        pending.
        """
        return self._hub.take(self._account, region, first, count, generation)[0]

    def take_apart(self, region: int, first: int, count: int, generation: int) -> tuple[Words, Words]:
        """As `take_and_clear`; the second bitmap has those of the pages that are only *possibly* dirty.

        That is what was owed to this user because another cleared it (the `exact` design), and what was pending from
        the start on. For users that count, opened with ``apart``; for others the second bitmap is empty.
        """
        taken, possible = self._hub.take(self._account, region, first, count, generation)
        return taken, np.zeros_like(taken) if possible is None else possible

    def look(self, region: int, first: int, count: int, generation: int) -> Words:
        """Sync and take a small range in one step, as a display does many times a second; see `take_and_clear`.

        Asks the kernel only for the slots that show the range. Other users get what that brought.
        """
        return self._hub.look(self._account, region, first, count, generation)

    def give_back(self, region: int, first: int, taken: Words) -> None:
        """Return bits that were taken but not delivered (rule 9); those of memory that has gone are dropped.

        No-op once this user has left: its bits went with it.
        """
        self._hub.give_back(self._account, region, first, taken)

    def close(self) -> None:
        """Leave; the last user switches logging off on all slots, even if it fails on some. Idempotent."""
        self._hub.leave(self._account)


class DirtyLogHub:
    """Owns a guest's kernel log. Thread-safe; all methods block."""

    def __init__(self, log: KernelLog, memory_map: MemoryMap) -> None:
        memory_map.check()
        self._log = log
        self._layout = Layout(memory_map)
        self._lock = threading.RLock()
        self._ledger: Ledger | None = None
        self._sources: list[ExternalLog] = []
        self._failed = ""
        self.counters = LogCounters()
        """Written under the lock only; a reader may see one of them a step ahead of another."""

    @property
    def offered(self) -> tuple[str, ...]:
        """Names of the safe strategies that this kernel can do, best first."""
        return offered(self._log.abilities)

    @property
    def strategy(self) -> str | None:
        """Name of the strategy in force; None while nobody uses the log."""
        ledger = self._ledger
        return ledger.strategy.name if ledger else None

    @property
    def map(self) -> MemoryMap:
        """Regions and slots as they are now."""
        return self._layout.map

    @property
    def users(self) -> tuple[LogUserStatus, ...]:
        """Who uses the log, in the order they came; waits for the operation that is under way."""
        with self._lock:
            accounts = self._ledger.accounts if self._ledger else []
            return tuple(
                LogUserStatus(name=who.name, exact=who.exact, pending=who.pages, taken=who.taken) for who in accounts
            )

    def open(self, name: str, strategy: str | None = None, *, unsafe: bool = False, apart: bool = False) -> HubUser:
        """Become a user of the log; all pages are pending for it. ``apart``: see `HubUser.take_apart`.

        The first user switches logging on for all slots and sets the strategy; ``strategy`` None takes the best, or
        the one in force, and never the place of its exact user, so that a display or a meter leaves that to a
        migration. Who names ``exact`` is the exact user; a log that a display or a meter has switched on goes over to
        the design which a migration names, where that is safe (`amig.dirty.registry.interchangeable`).

        Raises `ControlError`: ``unsupported`` (unknown, or this kernel can't do it), ``unsafe`` (it loses pages and
        ``unsafe`` was not given), ``strategy-in-use``, ``busy`` (a second exact user, or too many users),
        ``log-failed``; and `KvmError` when logging can't be switched on: then it is off.
        """
        with self._lock:
            chosen = self._choose(strategy, unsafe=unsafe)
            exact = chosen.one_exact_user and strategy is not None
            accounts = self._accounts
            if exact and any(other.exact for other in accounts):
                raise ControlError(f"{chosen.name} has its one user already: is a migration running?", code="busy")
            if len(accounts) >= MAX_USERS:
                raise ControlError(f"the dirty log has {MAX_USERS} users already", code="busy")
            if self._ledger is not None:
                self._ledger.strategy = chosen
                return HubUser(self, self._ledger.join(name, exact=exact, apart=apart))
            ledger = Ledger(chosen, self._layout)
            account = ledger.join(name, exact=exact, apart=apart)
            for source in self._sources:
                source.harvest()  # what was written before now is pending anyway
            self._switch_on(ledger)
            self._ledger = ledger
            return HubUser(self, account)

    def mark(self, region: int, first: int, count: int) -> None:
        """Mark pages that were written from the host's side as pending for every user.

        To be called after the write and before anyone is told of it: a user that takes the mark must find the new
        content. No-op while nobody uses the log. Raises `ControlError` with code ``bad-range``.
        """
        with self._lock:
            self._check_range(region, first, count)
            if self._ledger:
                self._ledger.mark(region, first, count)
                self.counters.pages_marked += count

    def attach(self, source: ExternalLog) -> None:
        """Harvest the log of another process with every sync from now on."""
        with self._lock:
            self._sources.append(source)

    def detach(self, source: ExternalLog) -> None:
        """Harvest it for the last time; no-op when it is not attached."""
        with self._lock:
            if source in self._sources:
                self._harvest()
                self._sources.remove(source)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the log still while slots are changed: wrap the ioctls and the call of `slots_changed` in it."""
        with self._lock:
            yield

    def slots_changed(self, memory_map: MemoryMap) -> None:
        """Go over to a new memory map, after slots were added, removed, moved or resized (design rule 5).

        What the kernel knew of a slot that went is lost with it, so all its pages become pending for every user; so
        do those of a new slot, for which logging is switched on. A take that names the old generation is refused from
        here on. If logging can't be switched on for a new slot the log has failed: every user is told so (code
        ``log-failed``) instead of missing writes.
        """
        memory_map.check()
        with self._lock:
            before = self._layout
            if memory_map.generation <= before.generation:
                raise UsageError("a changed memory map needs a higher generation number")
            self._layout = Layout(memory_map)
            if self._ledger is None:
                return
            self._ledger.move_to(self._layout)
            try:
                for slot in memory_map.slots:
                    if slot not in before.map.slots:
                        self._log.start(slot.index, manual=self._ledger.strategy.manual)
                        self._first_get(self._ledger, slot)
            except Exception as error:
                self._failed = f"the dirty log failed when memory slots changed: {error}"
                raise

    # What users call; see `HubUser`.

    def describe(self, account: Account) -> LogStarted:
        """See `HubUser.started`."""
        with self._lock:
            strategy = self._ledger_of(account).strategy
            return LogStarted(
                strategy=strategy.name,
                initially_set=strategy.manual and self._log.abilities.initially_set,
                generation=self._layout.generation,
            )

    def sync(self, account: Account, into: Mapping[int, Words] | None) -> dict[int, Words]:
        """See `HubUser.sync`."""
        with self._lock:
            ledger = self._ledger_of(account)
            if into is None:
                result = account.make_snapshot()
            else:
                result = {region: into[region] for region in account.pending if region in into}
                if any(
                    region not in result or result[region].size != own.size for region, own in account.pending.items()
                ):
                    raise ControlError("the buffers for a sync do not fit the memory map", code="bad-range")
            for slot in self._layout.map.slots:
                self._get(ledger, slot)
            self._harvest()
            for region, own in account.pending.items():
                np.copyto(result[region], own)
            self.counters.syncs += 1
            return result

    def take(
        self, account: Account, region: int, first: int, count: int, generation: int
    ) -> tuple[Words, Words | None]:
        """See `HubUser.take_apart`; None where nothing is told apart."""
        with self._lock:
            ledger = self._ledger_of(account)
            self._check_generation(generation)
            self._check_range(region, first, count)
            before = account.taken
            found = ledger.take(account, region, first, count, lambda wanted: self._clear(region, first, count, wanted))
            self.counters.takes += 1
            self.counters.pages_taken += account.taken - before
            return found

    def look(self, account: Account, region: int, first: int, count: int, generation: int) -> Words:
        """See `HubUser.look`."""
        with self._lock:
            ledger = self._ledger_of(account)
            self._check_generation(generation)
            self._check_range(region, first, count)
            for slot in self._layout.slots_of(region, first, count):
                self._get(ledger, slot)
            self._harvest()
            return self.take(account, region, first, count, generation)[0]

    def give_back(self, account: Account, region: int, first: int, taken: Words) -> None:
        """See `HubUser.give_back`."""
        with self._lock:
            if first < 0:
                raise ControlError(f"page {first} of region {region} does not exist", code="bad-range")
            if self._ledger and account in self._ledger.accounts:
                self._ledger.give_back(account, region, first, taken)

    def leave(self, account: Account) -> None:
        """See `HubUser.close`."""
        with self._lock:
            ledger = self._ledger
            if ledger is None or account not in ledger.accounts:
                return
            ledger.accounts.remove(account)
            account.pending = {}
            account.snapshot = {}
            if not ledger.accounts:
                self._ledger = None
                self._failed = ""
                self._switch_off(self._layout.map.slots)

    # What happens under the lock.

    @property
    def _accounts(self) -> list[Account]:
        return self._ledger.accounts if self._ledger else []

    def _choose(self, name: str | None, *, unsafe: bool) -> Strategy:
        abilities = self._log.abilities
        if self._failed:
            raise ControlError(self._failed, code="log-failed")
        now = self._ledger.strategy if self._ledger else None
        if now and name is None:
            return now
        name = name or best(abilities)
        kind = strategies.get(name)
        if kind is None:
            raise ControlError(f"no dirty-log strategy is called {name!r}", code="unsupported")
        if why_not := obstacle(name, abilities):
            raise ControlError(why_not, code="unsupported")
        if kind.unsafe and not unsafe:
            raise ControlError(f"{name} is known to lose pages and was not explicitly allowed", code="unsafe")
        if now and name == now.name:
            return now
        if now and not (interchangeable(name, now.name) and not any(user.exact for user in self._accounts)):
            raise ControlError(f"the dirty log is in use with {now.name}: take that, or wait", code="strategy-in-use")
        return kind()

    def _switch_on(self, ledger: Ledger) -> None:
        """Start all logs before the first GET of any: a write must find every log on or its page pending."""
        tried: list[Slot] = []
        try:
            for slot in self._layout.map.slots:
                tried.append(slot)
                self._log.start(slot.index, manual=ledger.strategy.manual)
            for slot in tried:
                self._first_get(ledger, slot)
        except BaseException as error:
            try:
                self._switch_off(tuple(tried))
            except Exception as also:
                error.add_note(f"switching the log off again failed too: {also}")
            raise

    def _switch_off(self, slots: tuple[Slot, ...]) -> None:
        failure: Exception | None = None
        for slot in slots:
            try:
                self._log.stop(slot.index)
            except Exception as error:
                failure = failure or error
        if failure:
            raise failure

    def _first_get(self, ledger: Ledger, slot: Slot) -> None:
        """Learn what a log starts with, before anything of it is cleared (rule 2): all ones where initially set.

        Without manual clear there is nothing to learn, and reading early would only protect pages early.
        """
        if ledger.strategy.manual:
            self._get(ledger, slot)

    def _get(self, ledger: Ledger, slot: Slot) -> None:
        raw = ledger.raw(slot)
        begun = perf_counter_ns()
        try:
            self._log.get(slot.index, raw)
        except BaseException:
            if not ledger.strategy.manual:
                ledger.forget(slot)  # the kernel may have cleared what it did not return
            raise
        self.counters.gets += 1
        self.counters.get_ns += perf_counter_ns() - begun
        ledger.got(slot, raw)

    def _clear(self, region: int, first: int, count: int, wanted: Words) -> None:
        for piece in self._layout.pieces(region, first, count, wanted):
            begun = perf_counter_ns()
            self._log.clear(piece.slot, piece.first, piece.count, piece.words)
            self.counters.clears += 1
            self.counters.clear_ns += perf_counter_ns() - begun
            self.counters.pages_cleared += bitmap.count(piece.words)

    def _ledger_of(self, account: Account) -> Ledger:
        if self._ledger is None or account not in self._ledger.accounts:
            raise ControlError(f"{account.name} is not a user of the dirty log (any more)", code="not-a-user")
        if self._failed:
            raise ControlError(self._failed, code="log-failed")
        return self._ledger

    def _harvest(self) -> None:
        """Hand what other processes have logged to every user; each bit was cleared where it came from."""
        for source in self._sources:
            found = source.harvest()
            if found is None or self._ledger is None:
                continue
            self.counters.pages_logged += bitmap.count(found)
            logged = found.size * WORD_PAGES
            for slot in self._layout.map.slots:
                begin = slot.guest_phys // PAGE_SIZE
                pages = min(slot.pages, logged - begin)
                if pages > 0 and (news := bitmap.extract(found, begin, pages)).any():
                    self._ledger.mark_bits(slot.region, start(slot), news, pages)

    def _check_generation(self, generation: int) -> None:
        if generation != self._layout.generation:
            raise ControlError(
                f"memory slots have changed: generation {generation} is now {self._layout.generation}; sync again",
                code="stale-generation",
            )

    def _check_range(self, region: int, first: int, count: int) -> None:
        pages = self._layout.pages.get(region, 0)
        if not (first >= 0 and 0 < count <= pages - first):
            raise ControlError(f"pages {first} + {count} of region {region} do not exist", code="bad-range")
