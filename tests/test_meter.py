"""The dirty-rate meter and the range watcher: what they count, and that nobody else notices them."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import amig
from amig import bitmap
from amig.dirty.hub import DirtyLogHub
from amig.dirty.log import LogAbilities
from amig.dirty.meter import MAX_SAMPLES, DirtyMeter, Span, spans_of
from amig.dirty.watch import RangeWatcher
from amig.errors import ControlError, UsageError
from amig.host import guest_abi as abi
from amig.host.attach import open_guest
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot
from amig.sim.kernel_log import SimKernelLog
from tests.moving import (
    CHECK,
    homes,  # noqa: F401 - a fixture
    hosting,
    machine_of,
    move,
    receiving,
    until,
    verdict,
)

ENGINES = [pytest.param("kvm", marks=pytest.mark.kvm), "simulator"]
PAGES = 1000
MAP = MemoryMap(
    generation=1,
    regions=(Region(id=0, size=PAGES * PAGE_SIZE),),
    slots=(Slot(index=0, guest_phys=0, size=PAGES * PAGE_SIZE, region=0, offset=0),),
)
ABILITIES = {
    "ones first": LogAbilities(manual_clear=True, initially_set=True),
    "zeros first": LogAbilities(manual_clear=True, initially_set=False),
    "old": LogAbilities(manual_clear=False, initially_set=False),
}


class Metered:
    """A guest whose writes a test decides, as a meter sees it."""

    def __init__(self, abilities: LogAbilities = ABILITIES["ones first"]) -> None:
        self.log = SimKernelLog(MAP, abilities)
        self.hub = DirtyLogHub(self.log, MAP)
        self.info = type("Info", (), {"memory": MAP})()
        self.script: list[list[int]] = []
        self.now = 0.0

    async def log_start(self, strategy: str | None, *, apart: bool = False):
        self.user = self.hub.open("meter", strategy, apart=apart)
        return self.user.started

    async def sync(self):
        return self.user.sync()

    async def take_apart(self, region: int, first: int, count: int):
        taken, possible = self.user.take_apart(region, first, count, 1)
        return taken, bitmap.count(possible)

    async def log_stop(self) -> None:
        self.user.close()

    async def sleep(self, seconds: float) -> None:
        """While the meter sleeps, the guest writes what the script says."""
        self.now += seconds
        if self.script:
            self.write(self.script.pop(0))

    def write(self, pages: list[int]) -> None:
        self.log.guest_write(0, pages)

    def meter(self, *spans: Span) -> DirtyMeter:
        return DirtyMeter(self, spans or None, clock=lambda: self.now, sleep=self.sleep)


@pytest.mark.parametrize("abilities", ABILITIES)
async def test_pages_written_in_each_sample(abilities: str) -> None:
    guest = Metered(ABILITIES[abilities])
    guest.script = [[1, 2, 3], [], [3, 3, 999], list(range(500))]
    async with guest.meter() as meter:
        found = [s async for s in meter.samples(0.5, 4)]
    assert [s.pages for s in found] == [3, 0, 2, 500]
    assert [s.possible for s in found] == [0, 0, 0, 0]
    assert found[3].pages_per_s == 1000
    assert guest.hub.strategy is None, "the log is off again"


async def test_the_working_set_grows_with_the_window() -> None:
    guest = Metered()
    guest.script = [[1, 2], [2, 3], [3, 4], [4, 5], [5, 6]]
    async with guest.meter() as meter:
        async for _ in meter.samples(1, 5):
            pass
    assert [(w.seconds, w.pages) for w in meter.working_set()] == [(1, 2), (2, 3), (4, 5), (5, 6)]


async def test_heat_says_where() -> None:
    guest = Metered()
    guest.script = [list(range(64)), list(range(32)), [999]]
    async with guest.meter() as meter:
        async for _ in meter.samples(1, 3):
            pass
    heat = meter.heat(1 << 20)
    assert heat.shape == (16,)
    assert heat[0] == pytest.approx(96 / 64 / 3)
    assert heat[15] == pytest.approx(1 / 64 / 3)
    assert not heat[1:15].any()
    assert meter.heat(1)[0] == pytest.approx(97 / 1024 / 3)


async def test_only_a_range() -> None:
    guest = Metered()
    guest.script = [[0, 63, 64, 127, 128]]
    spans = spans_of(MAP, 70 * PAGE_SIZE, PAGE_SIZE)
    assert spans == (Span(region=0, first=64, count=64),)
    async with guest.meter(*spans) as meter:
        (sample,) = [s async for s in meter.samples(1, 1)]
    assert sample.pages == 2
    assert meter.pages == 64
    assert spans_of(MAP, 999 * PAGE_SIZE, 1 << 40) == (Span(region=0, first=960, count=40),)
    with pytest.raises(UsageError, match="has no memory at"):
        spans_of(MAP, 1 << 40, 4096)


async def test_what_an_exact_user_cleared_is_only_possibly_dirty() -> None:
    """D4 owes the others what it clears beyond C: here a page that only the migration was told of."""
    guest = Metered()
    migration = guest.hub.open("migration", "exact")
    migration.take_and_clear(0, 0, PAGES, 1)
    async with guest.meter() as meter:
        guest.hub.mark(0, 5, 1)  # written by the host: known to all
        words = np.zeros(16, np.uint64)
        words[0] = 1 << 9
        migration.give_back(0, 0, words)
        migration.take_and_clear(0, 0, PAGES, 1)
        guest.script = [[7]]
        (sample,) = [s async for s in meter.samples(1, 1)]
    assert (sample.pages, sample.possible) == (2, 1)


async def test_a_page_that_is_owed_and_then_written_counts_as_written() -> None:
    guest = Metered()
    migration = guest.hub.open("migration", "exact")
    migration.take_and_clear(0, 0, PAGES, 1)
    async with guest.meter() as meter:
        migration.give_back(0, 0, bitmap.ones(64))
        migration.take_and_clear(0, 0, PAGES, 1)
        guest.script = [list(range(10))]
        (sample,) = [s async for s in meter.samples(1, 1)]
    assert (sample.pages, sample.possible) == (10, 54)


@pytest.mark.parametrize(("seconds", "count"), [(0, 1), (-1, 1), (float("nan"), 1), (1, 0), (1, MAX_SAMPLES + 1)])
async def test_samples_that_make_no_sense(seconds: float, count: int) -> None:
    async with Metered().meter() as meter:
        with pytest.raises(UsageError, match="samples last"):
            async for _ in meter.samples(seconds, count):
                pass


# --- the watcher ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abilities", ABILITIES)
def test_a_watcher_sees_what_changed_in_its_range_and_others_lose_nothing(abilities: str) -> None:
    guest = Metered(ABILITIES[abilities])
    other = guest.hub.open("other")
    other.take_and_clear(0, 0, PAGES, 1)
    with RangeWatcher(guest.hub, 0, 70, 10) as screen:
        guest.write([69, 70, 79, 80])
        assert bitmap.to_pages(screen.changed(), 70).tolist() == [70, 79]
        assert not screen.changed().any()
        guest.write([70])
        guest.hub.mark(0, 71, 1)
        assert bitmap.to_pages(screen.changed(), 70).tolist() == [70, 71]
        assert bitmap.to_pages(other.sync()[0]).tolist() == [69, 70, 71, 79, 80]
    other.close()
    assert guest.hub.strategy is None


def test_a_watcher_of_memory_that_is_not_there() -> None:
    guest = Metered()
    with pytest.raises(ControlError, match="do not exist"):
        RangeWatcher(guest.hub, 0, 990, 11)
    assert guest.hub.users == ()


def test_a_watcher_asks_only_for_the_slots_that_it_sees() -> None:
    half = PAGES // 2 * PAGE_SIZE
    memory_map = MemoryMap(
        generation=1,
        regions=MAP.regions,
        slots=tuple(Slot(index=n, guest_phys=n * half, size=half, region=0, offset=n * half) for n in (0, 1)),
    )
    log = SimKernelLog(memory_map)
    hub = DirtyLogHub(log, memory_map)
    with RangeWatcher(hub, 0, 600, 4) as screen:
        before = hub.counters.gets
        log.guest_write(1, [101])
        assert bitmap.to_pages(screen.changed(), 600).tolist() == [601]
        assert hub.counters.gets == before + 1


# --- on guests ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("homes")
@pytest.mark.parametrize("engine", ENGINES)
async def test_a_guests_rate_and_working_set_are_about_what_it_was_told(engine: str) -> None:
    async with hosting("workload=sequential ws=8M rate=100M", engine=engine) as source:
        guest = await open_guest(source.name)
        try:
            async with DirtyMeter(guest) as meter:
                async for _ in meter.samples(0.3, 4):
                    pass
        finally:
            await guest.close()
        ((gpa, pages),) = abi.ws_ranges(abi.parse_status(machine_of(source).memory.pages(0).reshape(-1)))
        assert 0.9 * pages < meter.working_set()[-1].pages < 1.3 * pages + 100
        heat = meter.heat(256)  # of 64 MiB: a quarter of a MiB each
        assert heat[gpa >> 18 : (gpa >> 18) + 30].mean() > 5 * heat[160:].mean()


@pytest.mark.usefixtures("homes")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", ["slot-cache", "exact", "auto-clear"])
async def test_meter_and_watcher_run_through_a_migration_that_ends_intact(engine: str, strategy: str) -> None:
    policy = amig.Policy(dirty_log=strategy, bandwidth=200e6, downtime=0.05, timeout=5, on_timeout="switch")
    async with hosting(CHECK, engine=engine) as source, receiving() as target:
        seen = {"meter": 0, "watcher": 0}
        stop = asyncio.Event()

        async def meter() -> None:
            guest = await open_guest(source.name)
            try:
                async with DirtyMeter(guest) as measuring:
                    async for sample in measuring.samples(0.02, 1000):
                        seen["meter"] += sample.pages
                        if stop.is_set():
                            return
            finally:
                await guest.close()

        async def watch() -> None:
            hub = source.hosted.hub
            with RangeWatcher(hub, 0, (24 << 20) // PAGE_SIZE, 256) as screen:
                while not stop.is_set():
                    seen["watcher"] += bitmap.count(await asyncio.to_thread(screen.changed))
                    await asyncio.sleep(0.01)

        async with amig.Migration(source.name, target.address, policy) as migration:
            await until(lambda: source.hosted.hub.users, "the migration uses the log, and sets the strategy")
            others = [asyncio.create_task(meter()), asyncio.create_task(watch())]
        assert (await migration.result()).dirty_log == strategy
        stop.set()
        gone = await asyncio.gather(*others, return_exceptions=True)
        assert not [error for error in gone if error is not None and not isinstance(error, ControlError)], gone
        await target.arrived()
        assert await verdict(machine_of(target.service)) == 0
        assert seen["meter"] > 0
        assert seen["watcher"] > 0


@pytest.mark.usefixtures("homes")
@pytest.mark.kvm
async def test_a_meter_of_a_guest_with_a_ring() -> None:
    async with hosting(CHECK, dirty_ring=4096, vcpus=2) as source, receiving() as target:
        guest = await open_guest(source.name)
        try:
            async with DirtyMeter(guest) as meter:
                async for sample in meter.samples(0.1, 3):
                    assert sample.pages > 0
                await move(source, target.address, amig.Policy(downtime=0.05, timeout=5, on_timeout="switch"))
                await target.arrived()
        except ControlError:
            pass  # its host has gone meanwhile
        finally:
            await guest.close()
        assert await verdict(machine_of(target.service)) == 0
