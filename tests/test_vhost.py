"""Writers that KVM does not see: a log shared with other processes, and backends that use it while a guest moves."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

import amig
from amig.dirty import atomic
from amig.dirty.hub import DirtyLogHub
from amig.dirty.vhost import VhostLog
from amig.errors import AmigError, ControlError, HostError
from amig.host import backends
from amig.host.attach import open_control
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot
from amig.sim.kernel_log import SimKernelLog
from tests.moving import (
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

ENGINES = [pytest.param("kvm", marks=pytest.mark.kvm), "simulator"]
BUSY = amig.Policy(downtime=0.05, timeout=5, on_timeout="switch")
CALM = "workload=check ws=24M rate=20M report=0"
"""Leaves the link to the backend."""
FIRST, PAGES = 48 * MIB // PAGE_SIZE, 1024
"""The backend's part of a guest of 64 MiB; the guest works on what lies below."""
GIB = 1 << 30


def two_slots() -> MemoryMap:
    """One region, seen in two places; and a hole between."""
    return MemoryMap(
        generation=1,
        regions=(Region(id=7, size=200 * PAGE_SIZE),),
        slots=(
            Slot(index=0, guest_phys=0, size=100 * PAGE_SIZE, region=7, offset=0),
            Slot(index=1, guest_phys=4 * GIB + 3 * PAGE_SIZE, size=150 * PAGE_SIZE, region=7, offset=50 * PAGE_SIZE),
        ),
    )


def pages_of(words: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


@pytest.fixture
def log():
    made = VhostLog(two_slots())
    shared = mmap.mmap(made.fd, made.size)
    made.bits = np.frombuffer(shared, np.uint8)
    yield made
    del made.bits
    shared.close()
    made.close()


def set_bit(log, page: int) -> None:
    log.bits[page // 8] |= 1 << page % 8


def test_the_log_covers_all_of_the_guests_addresses(log) -> None:
    assert log.pages >= (4 * GIB) // PAGE_SIZE + 153
    assert os.fstat(log.fd).st_size == log.size
    with pytest.raises(OSError):
        os.ftruncate(log.fd, 0)


def test_a_harvest_takes_the_bits_and_leaves_none(log) -> None:
    assert log.harvest() is None
    for page in (0, 63, 64, log.pages - 1):
        set_bit(log, page)
    assert pages_of(log.harvest()) == [0, 63, 64, log.pages - 1]
    assert log.harvest() is None
    assert not log.bits.any()
    log.close()
    assert log.harvest() is None


WAYS = ["library", "kernel"]


def go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one of the ways to take bits atomically, or skip where there is none."""
    try:
        harvest = atomic._by_library() if way == "library" else atomic._by_kernel()
    except OSError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(atomic, "_harvest", lambda: harvest)


SETTER = """
import ctypes, mmap, sys, time
shared = mmap.mmap(int(sys.argv[1]), 4096)
base = ctypes.addressof(ctypes.c_char.from_buffer(shared))
syscall = ctypes.CDLL(None).syscall
syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_long] + [ctypes.c_void_p] * 2
for number in range(64 * 64):
    at = number % 64 * 64 + number // 64
    if not number % 64:
        time.sleep(0.001)  # the taker shall come between
    assert syscall(202, base + at // 32 * 4, 133, 0, 0, base + at // 32 * 4, 10 << 28 | at % 32 << 12) == 0
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_bit_set_during_the_harvest_is_found_sooner_or_later(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process sets each bit once, as fast as it can, while we take them: none gets lost or comes twice."""
    go(way, monkeypatch)
    fd = os.memfd_create("words")
    os.ftruncate(fd, 4096)
    shared = mmap.mmap(fd, 4096)
    words, out = np.frombuffer(shared, np.uint64, 64), np.zeros(64, np.uint64)
    total = np.zeros(64 * 64, np.int64)
    harvests = 0
    with subprocess.Popen([sys.executable, "-c", SETTER, str(fd)], pass_fds=(fd,)) as setter:
        last = False
        while not last:
            last = setter.poll() is not None
            if atomic.take(words, out):
                harvests += 1
                total += np.unpackbits(out.view(np.uint8), bitorder="little")
    assert setter.returncode == 0
    assert harvests > 1
    assert (total == 1).all()
    del words
    shared.close()
    os.close(fd)


@pytest.mark.parametrize("way", WAYS)
def test_every_bit_of_a_word_is_taken(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    rng = np.random.default_rng(1)
    for _ in range(20):
        before = rng.integers(0, 2**64, 70, np.uint64)
        before[[3, 5, 7, 9]] = [0, 2**64 - 1, 0xFFFF_FFFF, 0xFFFF_FFFF << 32]
        words, out = before.copy(), rng.integers(0, 2**64, 70, np.uint64)
        assert atomic.take(words, out)
        assert (out == before).all()
        assert not words.any()


def test_the_hub_hands_what_others_logged_to_every_user_in_its_regions_own_pages(log) -> None:
    hub = DirtyLogHub(SimKernelLog(two_slots()), two_slots())
    hub.attach(log)
    set_bit(log, 5)
    users = [hub.open("one"), hub.open("two")]
    for user in users:
        user.take_and_clear(7, 0, 200, 1)
    assert not users[0].sync()[7].any(), "what was logged before was pending anyway"
    set_bit(log, 9)
    set_bit(log, 99)
    set_bit(log, (4 * GIB) // PAGE_SIZE + 3 + 149)
    set_bit(log, 1000)  # nobody's
    for user in users:
        assert pages_of(user.sync()[7]) == [9, 99, 199]
    assert hub.counters.pages_logged == 4
    set_bit(log, 10)
    hub.detach(log)
    assert pages_of(users[0].sync()[7]) == [9, 10, 99, 199], "the last harvest"
    set_bit(log, 11)
    assert 11 not in pages_of(users[0].sync()[7])
    hub.detach(log)


@pytest.mark.parametrize("strategy", ["slot-cache", "exact", "auto-clear"])
def test_a_mark_outlives_a_failed_sync(log, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = DirtyLogHub(SimKernelLog(two_slots()), two_slots())
    hub.attach(log)
    user = hub.open("one", strategy)
    user.take_and_clear(7, 0, 200, 1)
    user.sync()
    user.take_and_clear(7, 0, 200, 1)
    set_bit(log, 9)
    with monkeypatch.context() as broken:
        broken.setattr(hub, "_get", lambda *a: (_ for _ in ()).throw(HostError("no")))
        with pytest.raises(HostError):
            user.sync()
    assert pages_of(user.sync()[7]) == [9]


def test_without_a_way_to_take_bits_a_shared_log_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(atomic, "_LIBRARY", "libatomic-there-is-none.so")
    atomic._harvest.cache_clear()
    try:
        VhostLog(two_slots()).close()  # the kernel's way
        monkeypatch.setattr(atomic, "_SYS_FUTEX", 100_000)
        atomic._harvest.cache_clear()
        with pytest.raises(HostError, match="apt install libatomic1"):
            VhostLog(two_slots())
    finally:
        atomic._harvest.cache_clear()


# --- backends, in processes of their own ----------------------------------------------------------------------------


class Writer:
    """A backend process and what it said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            return (await self.process.stdout.readline()).decode().strip()

    async def generations(self) -> np.ndarray:
        """What it had written when it was stopped."""
        return np.array(json.loads(await self.line()), np.uint64)

    async def detach(self) -> np.ndarray:
        assert self.process.stdin is not None
        self.process.stdin.close()
        found = await self.generations()
        assert await self.process.wait() == 0
        return found


@asynccontextmanager
async def backend(path: Path, *, forget: bool = False, first: int = FIRST) -> AsyncIterator[Writer]:
    script = Path(__file__).with_name("backend.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), str(path), str(first), str(PAGES), str(int(forget)),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    writer = Writer(process)
    try:
        assert await writer.line() == "attached"
        yield writer
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


def wrong(machine, generations: np.ndarray) -> list[int]:
    """The pages that are not what the backend wrote last."""
    words = machine.memory.pages(0)[FIRST : FIRST + PAGES].view(np.uint64)
    expected = np.where(generations, generations << np.uint64(32) | np.arange(PAGES, dtype=np.uint64), np.uint64(0))
    return np.flatnonzero((words != expected[:, None]).any(axis=1)).tolist()


@pytest.mark.usefixtures("homes")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", ["slot-cache", "exact", "auto-clear"])
async def test_what_a_backend_writes_during_a_migration_arrives(engine: str, strategy: str) -> None:
    policy = amig.Policy(dirty_log=strategy, downtime=0.05, timeout=5, on_timeout="switch", bandwidth=100e6)
    async with hosting(CALM, engine=engine) as source, receiving() as target, backend(source.socket_path) as writer:
        await until(lambda: machine_of(source).memory.pages(0)[FIRST + PAGES // 2].any(), "the backend writes")
        await move(source, target.address, policy)
        await target.arrived()
        generations = await writer.generations()
        assert generations.max() > 1
        assert wrong(machine_of(target.service), generations) == []
        assert await verdict(machine_of(target.service)) == 0


@pytest.mark.usefixtures("homes")
@pytest.mark.kvm
async def test_the_same_by_ring() -> None:
    async with (
        hosting(CALM, dirty_ring=4096) as source,
        receiving() as target,
        backend(source.socket_path) as one,
        backend(source.socket_path, first=FIRST + PAGES) as two,
    ):
        await move(source, target.address, BUSY)
        await target.arrived()
        assert wrong(machine_of(target.service), await one.generations()) == []
        assert (await two.generations()).max() > 0
        assert await verdict(machine_of(target.service)) == 0


@pytest.mark.usefixtures("homes")
async def test_a_backend_that_does_not_log_loses_pages() -> None:
    """The test above can fail."""
    async with (
        hosting(CALM, engine="simulator") as source,
        receiving() as target,
        backend(source.socket_path, forget=True) as writer,
    ):
        policy = amig.Policy(bandwidth=50e6, downtime=0.2, timeout=3, on_timeout="switch", verify="off")
        await move(source, target.address, policy)  # the digests might tell before the backend does
        await target.arrived()
        assert wrong(machine_of(target.service), await writer.generations())


@pytest.mark.usefixtures("homes")
async def test_backends_rest_while_the_guest_does() -> None:
    async with hosting(engine="simulator") as source, backend(source.socket_path) as writer:
        async with await open_control(source.name) as operator:
            await operator.pause()
            generations = await writer.generations()
            assert wrong(machine_of(source), generations) == []
            await operator.pause()
            assert wrong(machine_of(source), generations) == []
            await operator.resume()
            await until(lambda: wrong(machine_of(source), generations), "it writes on")
            await operator.pause()
            assert (await writer.generations()).sum() > generations.sum()
            await operator.resume()
        assert wrong(machine_of(source), await writer.detach()) == []
        assert source.hosted.backends.names == ()


@pytest.mark.usefixtures("homes")
async def test_a_backend_that_comes_while_the_guest_is_paused_waits() -> None:
    async with hosting(engine="simulator") as source:
        async with await open_control(source.name) as operator:
            await operator.pause()
            async with backend(source.socket_path) as writer:
                await operator.resume()
                await until(lambda: machine_of(source).memory.pages(0)[FIRST:].any(), "it writes")
                await writer.detach()


@pytest.mark.usefixtures("homes")
async def test_after_a_backend_was_killed_all_memory_counts_as_written() -> None:
    async with hosting("workload=idle", engine="simulator") as source:
        user = source.hosted.hub.open("counts")
        generation = user.started.generation
        async with backend(source.socket_path, forget=True) as writer:
            pages = machine_of(source).memory.map.regions[0].pages
            user.take_and_clear(0, 0, pages, generation)
            writer.process.kill()
            await until(lambda: not source.hosted.backends.names, "its connection has ended")
        await until(lambda: np.bitwise_count(user.take_and_clear(0, 0, pages, generation)).sum() > pages - 64, "marks")
        user.close()


@pytest.mark.usefixtures("homes")
async def test_a_backend_that_never_stops_fails_the_pause_and_the_guest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "STOP_TIMEOUT", 0.1)
    async with hosting(engine="simulator") as source, receiving() as target:
        deaf = backends.Backend("deaf", lambda number: None)
        await source.hosted.backends.attach(deaf)
        with pytest.raises(AmigError, match="device backend deaf did not stop"):
            await move(source, target.address, BUSY)
        await assert_stayed(source)
        assert source.hosted.backends.running
        deaf.stopped(1)
        assert not deaf.rests.is_set(), "a late answer to a stop that was taken back"
        await source.hosted.backends.leave(deaf, in_order=True)
        await move(source, target.address, BUSY)
        await target.arrived()


@pytest.mark.usefixtures("homes")
async def test_what_a_backend_may_not_do() -> None:
    async with hosting(engine="simulator") as source:
        from amig.control import replies as rp
        from amig.control import requests as rq
        from amig.control.fdpass import close_all
        from amig.control.link import Link

        link = await Link.connect(source.socket_path)
        try:
            _, fds = await link.hello(client="one", want_memory=False)
            for early in (rq.VhostStopped(number=1),):
                with pytest.raises(ControlError) as caught:
                    await link.ask(early)
                assert caught.value.code == "wrong-state"
            reply, fds = await link.request(rq.VhostAttach(), rp.VhostIsAttached)
            assert len(fds) == len(reply.memory.regions) + 1
            for fd in fds:
                with pytest.raises(OSError):
                    os.ftruncate(fd, 0)
            close_all(fds)
            with pytest.raises(ControlError) as caught:
                await link.request(rq.VhostAttach(), rp.VhostIsAttached)
            assert caught.value.code == "already-on"
            await link.ask(rq.VhostDetach())
            await link.ask(rq.VhostDetach())
        finally:
            link.close()
