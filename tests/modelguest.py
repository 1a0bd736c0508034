"""A guest that lives in numpy arrays: real hub, exact model of the kernel's log, a writer that tests drive by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from amig.dirty.hub import DirtyLogHub, HubUser
from amig.guest import GuestInfo, Handover, LogStarted, Outcome, Progress, RunState
from amig.memory import PAGE_SIZE, GuestMemory, MemoryMap, Pages, Region, Slot, Words
from amig.pieces import Pieces
from amig.sim.kernel_log import SimKernelLog
from amig.stages.items import Block, Codec, RoundEnd
from amig.stages.receive import Landing


def one_region(pages: int) -> MemoryMap:
    """Return a map of one region, seen through one slot."""
    size = pages * PAGE_SIZE
    return MemoryMap(
        generation=1,
        regions=(Region(id=0, size=size),),
        slots=(Slot(index=0, guest_phys=0, size=size, region=0, offset=0),),
    )


class ArrayMemory:
    """Guest memory in plain arrays; ``holes`` are page ranges that nothing was ever put into."""

    def __init__(self, memory_map: MemoryMap) -> None:
        self.map = memory_map
        self.arrays = {r.id: np.zeros((r.pages, PAGE_SIZE), np.uint8) for r in memory_map.regions}
        self.touched = {r.id: np.zeros(r.pages, np.bool_) for r in memory_map.regions}

    def pages(self, region: int) -> Pages:
        return self.arrays[region]

    def data_ranges(self, region: int, first: int, count: int) -> list[tuple[int, int]]:
        touched = self.touched[region][first : first + count]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], touched, [False]]).astype(np.int8)))
        return [(first + int(a), int(b - a)) for a, b in edges.reshape(-1, 2)]

    def fds(self) -> Mapping[int, int]:
        return {}


class ModelGuest:
    """`amig.guest.Guest` over an array memory."""

    def __init__(self, pages: int, seed: int = 1) -> None:
        self.array = ArrayMemory(one_region(pages))
        self.memory: GuestMemory = self.array
        self.log = SimKernelLog(self.array.map)
        self.hub = DirtyLogHub(self.log, self.array.map)
        self.random = np.random.default_rng(seed)
        self.user: HubUser | None = None
        self.state = RunState.RUNNING
        self.calls: list[str] = []
        self.on_save: Callable[[], None] = lambda: None
        self.before_take: Callable[[], None] = lambda: None
        self.after_take: Callable[[], None] = lambda: None
        self.on_cancel: Callable[[str], None] | None = None
        self.registered = ""
        self.progress = Progress()

    @property
    def info(self) -> GuestInfo:
        return GuestInfo(
            name="model",
            engine="simulator",
            vcpus=1,
            memory=self.array.map,
            state=self.state,
            machine=b"model",
            strategies=self.hub.offered,
        )

    def write(self, pages: np.ndarray | list[int], *, zero: bool = False) -> None:
        """The guest writes pages: new random content, or zeros."""
        assert self.state is RunState.RUNNING or self.calls[-1] == "save"
        index = np.asarray(pages, np.int64)
        with self.log.atomically():
            content = self.random.integers(1, 255, (len(index), 8), np.uint8)
            self.array.arrays[0][index, :8] = 0 if zero else content
            self.array.arrays[0][index, -8:] = 0 if zero else content
            self.array.touched[0][index] = True
            self.log.guest_write(0, index)

    async def log_start(self, strategy: str | None, *, unsafe: bool = False) -> LogStarted:
        self.calls.append("log_start")
        self.user = self.hub.open("migration", strategy, unsafe=unsafe)
        return self.user.started

    async def sync(self) -> Mapping[int, Words]:
        assert self.user is not None
        return self.user.sync()

    async def take_and_clear(self, region: int, first: int, count: int) -> Words:
        assert self.user is not None
        self.before_take()
        await asyncio.sleep(0)
        words = self.user.take_and_clear(region, first, count, self.array.map.generation)
        self.after_take()
        return words

    async def give_back(self, region: int, first: int, taken: Words) -> None:
        assert self.user is not None
        self.user.give_back(region, first, taken)

    async def log_stop(self) -> None:
        self.calls.append("log_stop")
        if self.user is not None:
            self.user.close()
            self.user = None

    async def pause(self) -> None:
        self.calls.append("pause")
        self.state = RunState.PAUSED

    async def resume(self) -> None:
        self.calls.append("resume")
        self.state = RunState.RUNNING

    async def save(self) -> bytes:
        self.calls.append("save")
        self.on_save()
        return b"state"

    async def prepare(self, handover: Handover) -> None:
        self.calls.append("prepare")

    async def commit(self, migration: str) -> None:
        self.calls.append("commit")
        self.state = RunState.COMMITTED

    async def release(self, migration: str, outcome: Outcome) -> None:
        self.calls.append(f"release {outcome}")
        self.state = RunState.STOPPED if outcome is Outcome.RUNNING else RunState.RUNNING

    async def migration_begin(self, migration: str, destination: str) -> None:
        self.registered = migration

    def migration_progress(self, progress: Progress) -> None:
        self.progress = progress

    async def migration_end(self, status: str, error: str = "") -> None:
        self.registered = ""

    async def close(self) -> None:
        self.calls.append("close")
        await self.log_stop()
        if self.state is RunState.PAUSED:
            self.state = RunState.RUNNING


class ModelIncoming:
    """`amig.guest.Incoming` over an array memory."""

    def __init__(self, memory_map: MemoryMap | None = None) -> None:
        self.array = ArrayMemory(memory_map) if memory_map else None
        self.calls: list[str] = []
        self.backed: set[int] = set()
        self.expected = ""
        self.state = b""

    async def build(self, *, name: str, machine: bytes, memory: MemoryMap) -> str:
        self.calls.append("build")
        self.array = ArrayMemory(memory)
        return f"model/{name}"

    async def expect(self, migration: str) -> None:
        self.expected = migration

    def pages(self, region: int) -> Pages:
        assert self.array is not None
        return self.array.arrays[region]

    def populate(self, region: int, first: int, count: int) -> bool:
        self.backed.update(range(first, first + count))
        return True

    def punch(self, region: int, first: int, count: int) -> None:
        self.backed.difference_update(range(first, first + count))
        self.pages(region)[first : first + count] = 0

    def data_ranges(self, region: int, first: int, count: int) -> list[tuple[int, int]]:
        return [(first, count)]

    async def load(self, state: bytes) -> None:
        self.calls.append("load")
        self.state = state

    async def commit(self, migration: str) -> None:
        self.calls.append("commit")

    async def run(self) -> None:
        self.calls.append("run")

    async def settle(self) -> None:
        self.calls.append("settle")

    async def discard(self, migration: str) -> None:
        self.calls.append("discard")


class Unthrottled:
    """A `Throttle` that never waits."""

    async def take(self, size: int) -> None:
        pass


@dataclass
class MemoryLink:
    """A connection inside the process: block sink and block source on one queue of copies."""

    live: bool = True
    queue: asyncio.Queue[tuple[Block, bytes] | RoundEnd | None] = field(default_factory=lambda: asyncio.Queue(4))
    delay: Callable[[], asyncio.Future[None]] | None = None
    blocks: list[Block] = field(default_factory=list)
    landed: int = 0

    async def send_block(self, block: Block) -> int:
        if self.delay is not None:
            await self.delay()
        self.blocks.append(block)
        data = block.data
        content = b"".join(data.views()) if isinstance(data, Pieces) else bytes(data or b"")
        await self.queue.put((block, content))
        return 64 + block.size

    async def send_round(self, end: RoundEnd) -> None:
        if self.delay is not None:
            await self.delay()
        await self.queue.put(end)

    async def receive(self, buffer: Pages, landing: Landing) -> Block | RoundEnd | None:
        item = await self.queue.get()
        if item is None or isinstance(item, RoundEnd):
            return item
        block, content = item
        pieces = None
        if block.codec is Codec.RAW:
            pieces = landing.land(block.round, block.region, block.first, block.pages & ~block.zero)
        if pieces is None:
            view = buffer.reshape(-1).data[: len(content)]
            view[:] = content
            data = view if content else None
            return replace(block, data=data, size=len(content), buffer=buffer if content else None)
        for view in pieces.views():
            view[:], content = content[: len(view)], content[len(view) :]
        self.landed += 1
        return replace(block, data=None, size=0, buffer=None)
