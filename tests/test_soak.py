"""Long and heavy: guests that move for hours, many at once, and large ones. The short form of each runs always.

The long forms: ``pytest -m soak tests/test_soak.py -s``. AMIG_SOAK_SEED repeats a run's choices, AMIG_SOAK_MIGRATIONS
says how many migrations (200), AMIG_SOAK_LOG is a file for a line of JSON about each of them.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from pathlib import Path

import pytest

from amig.host.room import room
from tests.soaking import MIB, Mover, Watch, record, two_sides

pytestmark = pytest.mark.kvm
GIB = 1 << 30
LOG = os.environ.get("AMIG_SOAK_LOG")
HEAVY = "workload=check ws=96M rate=400M report=0"
LIGHT = "workload=check ws=16M rate=10M report=0"


def seed() -> int:
    """Return what all choices follow from, and say it."""
    found = int(os.environ.get("AMIG_SOAK_SEED") or secrets.randbelow(1 << 32))
    print(f"AMIG_SOAK_SEED={found}")
    return found


async def back_and_forth(root: Path, migrations: int, *, append: str, memory: int, vcpus: int) -> Watch:
    """Move a guest so many times; it is asked to verify its memory after each."""
    pages = 0
    async with two_sides(root) as sides:
        mover = Mover("g", memory, random.Random(seed()), sides)
        watch = Watch(sides)
        await mover.boot(append, vcpus)
        with record(LOG) as write:
            for number in range(migrations):
                done = await mover.move()
                pages += await mover.verify()
                write({**done, "figures": watch.look()})
                if number % 10 == 9:
                    print(f"{number + 1} migrations, {mover.cancelled} cancelled, {watch.seen[-1]}", flush=True)
            write({"migrations": migrations, "cancelled": mover.cancelled, "pages_verified": pages})
    return watch


async def test_a_guest_moves_back_and_forth_with_options_by_chance(tmp_path: Path) -> None:
    await back_and_forth(tmp_path / "s", 4, append=LIGHT, memory=64 * MIB, vcpus=2)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("vcpus", [1, 2])
async def test_a_guest_of_few_processors_moves_twenty_times(tmp_path: Path, vcpus: int) -> None:
    await back_and_forth(tmp_path / "s", 20, append=HEAVY, memory=192 * MIB, vcpus=vcpus)


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
async def test_a_guest_moves_two_hundred_times_and_nothing_adds_up(tmp_path: Path) -> None:
    migrations = int(os.environ.get("AMIG_SOAK_MIGRATIONS") or 200)
    watch = await back_and_forth(tmp_path / "s", migrations, append=HEAVY, memory=192 * MIB, vcpus=4)
    for name in watch.seen[0]:
        for figure in ("private", "shared", "descriptors", "threads"):
            before, after = watch.growth(name, figure)
            print(f"{name}: {figure} {before} -> {after}")
    most = {"private": 16 * MIB, "shared": 16 * MIB, "descriptors": 1, "threads": 4}
    for name in watch.seen[0]:
        for figure, allowed in most.items():
            before, after = watch.growth(name, figure)
            assert after <= before + allowed, f"{name}: {figure} grow from {before} to {after}: {watch.seen[-1]}"


async def many_at_once(root: Path, guests: int, times: int) -> None:
    """Move all guests at once to the other side, so many times."""
    chance = random.Random(seed())
    async with two_sides(root) as sides:
        movers = [Mover(f"g{i}", 32 * MIB, random.Random(chance.getrandbits(32)), sides) for i in range(guests)]
        for mover in movers:  # a side answers one command at a time
            await mover.boot("workload=check ws=8M rate=2M report=0", 1)
        for _ in range(times):
            began = time.monotonic()
            await asyncio.gather(*(mover.move(cancel=0.1) for mover in movers))
            for mover in movers:
                assert await mover.verify() == 8 * MIB // 4096
            print(f"all {guests} on the other side and intact, {time.monotonic() - began:.1f} s", flush=True)


async def test_ten_guests_move_at_once(tmp_path: Path) -> None:
    await many_at_once(tmp_path / "s", 10, 1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_ten_guests_move_at_once_back_and_forth(tmp_path: Path) -> None:
    await many_at_once(tmp_path / "s", 10, 10)


async def half_touched(root: Path, memory: int, timeout: float) -> None:
    """Move a guest that uses half of its memory there and back: the other half takes nothing on either end."""
    used = memory // 2
    if room().bytes < 2 * used + GIB:
        pytest.skip(f"needs {2 * used >> 30} GiB of free memory for both sides, and 1 GiB beside")
    with record(LOG) as write:
        async with two_sides(root) as sides:
            mover = Mover("big", memory, random.Random(seed()), sides)
            async with asyncio.timeout(timeout):
                await mover.boot(f"workload=check ws={used >> 20}M ws_from={used >> 20}M rate=20M report=0", 1)
                before = await mover.used()
                assert used <= before < used + used // 128 + 8 * MIB, "the guest's own tables, and its image"
                for _ in range(2):
                    done = await mover.move(cancel=0.5, plain=True)
                    pages = await mover.verify()
                    assert pages == used // 4096
                    after = await mover.used()
                    write({**done, "used_before": before, "used_after": after, "pages_verified": pages})
                    assert after <= before, "a hole was filled on the way"


@pytest.mark.timeout(300)
async def test_a_guest_that_is_half_holes(tmp_path: Path) -> None:
    await half_touched(tmp_path / "s", GIB, 250)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_guest_of_16_gib_that_is_half_holes(tmp_path: Path) -> None:
    await half_touched(tmp_path / "s", 16 * GIB, 3500)
