"""A snapshot file as the source: a guest that stands still, loaded into memory and sent like any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from amig import bitmap
from amig.errors import ControlError
from amig.guest import GuestInfo, Handover, LogStarted, Outcome, Progress, RunState
from amig.host.memory import MemfdMemory
from amig.memory import GuestMemory, MemoryMap, Pages, Words
from amig.session.restore import restore


class _Loading:
    """`amig.guest.Incoming` that keeps what comes instead of running it."""

    def __init__(self) -> None:
        self.memory: MemfdMemory | None = None
        self.machine = b""
        self.state = b""

    async def build(self, *, name: str, machine: bytes, memory: MemoryMap) -> str:
        self.machine = machine
        self.memory = MemfdMemory(memory)
        return name

    async def expect(self, migration: str) -> None:
        """Nobody will ask for it."""

    def pages(self, region: int) -> Pages:
        assert self.memory is not None  # noqa: S101 - build comes first
        return self.memory.pages(region)

    def populate(self, region: int, first: int, count: int) -> bool:
        assert self.memory is not None  # noqa: S101 - as above
        return self.memory.populate(region, first, count)

    def punch(self, region: int, first: int, count: int) -> None:
        assert self.memory is not None  # noqa: S101 - as above
        self.memory.punch(region, first, count)

    def data_ranges(self, region: int, first: int, count: int) -> list[tuple[int, int]]:
        assert self.memory is not None  # noqa: S101 - as above
        return self.memory.data_ranges(region, first, count)

    async def load(self, state: bytes) -> None:
        self.state = state

    async def commit(self, migration: str) -> None:
        pass

    async def run(self) -> None:
        pass

    async def settle(self) -> None:
        """Nothing was needed."""

    async def discard(self, migration: str) -> None:
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class SnapshotGuest:
    """`amig.guest.Guest` out of a file: paused for ever, nothing is ever dirty, committing it changes nothing.

    The file stays: what arrives at the destination is a clone of the guest that was saved.
    """

    def __init__(self, info: GuestInfo, memory: MemfdMemory, state: bytes) -> None:
        self._info = info
        self._memory = memory
        self._state = state
        self._pending: dict[int, Words] = {}
        self.on_cancel: Callable[[str], None] | None = None

    @classmethod
    async def load(cls, path: str) -> SnapshotGuest:
        """Read the whole snapshot into memory. Raises `SnapshotError`."""
        loading = _Loading()
        hello = await restore(path, loading)
        assert loading.memory is not None  # noqa: S101 - restore has built it
        info = GuestInfo(
            name=hello.name,
            engine=hello.engine,
            vcpus=hello.vcpus,
            memory=hello.memory,
            state=RunState.PAUSED,
            machine=hello.machine,
            strategies=("none",),
        )
        return cls(info, loading.memory, loading.state)

    @property
    def info(self) -> GuestInfo:
        """As the snapshot says."""
        return self._info

    @property
    def memory(self) -> GuestMemory:
        """Its memory, loaded."""
        return self._memory

    async def log_start(self, strategy: str | None, *, unsafe: bool = False) -> LogStarted:
        """All pages are pending, once."""
        self._pending = {region.id: bitmap.ones(region.pages) for region in self._info.memory.regions}
        return LogStarted(strategy="none", initially_set=True, generation=self._info.memory.generation)

    async def sync(self) -> Mapping[int, Words]:
        """What was not taken yet."""
        return {region: words.copy() for region, words in self._pending.items()}

    async def take_and_clear(self, region: int, first: int, count: int) -> Words:
        """Take pending bits; there is no kernel to clear them in."""
        taken = bitmap.extract(self._pending[region], first, count)
        bitmap.clear_range(self._pending[region], first, count)
        return taken

    async def give_back(self, region: int, first: int, taken: Words) -> None:
        """They are pending again."""
        bitmap.or_into(self._pending[region], first, taken, min(len(taken) * 64, self._pages(region) - first))

    def _pages(self, region: int) -> int:
        return self._info.memory.region(region).pages

    async def log_stop(self) -> None:
        """Nothing to stop."""

    async def pause(self) -> None:
        """It never runs."""

    async def resume(self) -> None:
        """It never runs."""

    async def save(self) -> bytes:
        """Return the state that was saved with it."""
        return self._state

    async def prepare(self, handover: Handover) -> None:
        """No record is needed: the file never runs."""

    async def commit(self, migration: str) -> None:
        """As above."""

    async def release(self, migration: str, outcome: Outcome) -> None:
        """Either way the file stays."""
        if outcome is Outcome.DISCARDED:
            raise ControlError("the destination discarded the guest; the snapshot is still there", code="discarded")

    async def migration_begin(self, migration: str, destination: str) -> None:
        """Nobody looks at a file."""

    def migration_progress(self, progress: Progress) -> None:
        """As above."""

    async def migration_end(self, status: str, error: str = "") -> None:
        """As above."""

    async def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
