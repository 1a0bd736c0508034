"""Guests that move between two processes of hosts, again and again, with options by chance, and what that leaves.

The hosts' processes and the one that migrates live as long as the whole run, so whatever is not given back adds up.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

import amig
from amig.bench import hosts
from amig.children import Child, Place
from amig.cli.verdict import verdict_of
from amig.events import State, StateChanged
from amig.guest import RunState
from amig.host.attach import open_control, open_guest
from amig.host.stock import in_use

MIB = 1 << 20
TIMEOUT = 120.0


class Side:
    """One process of hosts."""

    def __init__(self, child: Child) -> None:
        self.name = child.name
        self.pid = child.process.pid
        self._child = child
        self._turn = asyncio.Lock()

    async def do(self, command: hosts.Command) -> hosts.Answer:
        """Have it do something; fails with its words when it can't."""
        assert self._child.process.stdin is not None
        async with self._turn:
            self._child.process.stdin.write(msgspec.json.encode(command) + b"\n")
            answer = msgspec.convert(await self._child.line("answer", timeout=TIMEOUT), hosts.Answer)
        assert not answer.error, answer.error
        assert not answer.words, answer.words
        return answer


@asynccontextmanager
async def two_sides(root: Path) -> AsyncIterator[tuple[Side, Side]]:
    """Run two processes of hosts until the block ends."""
    root.mkdir()
    place = Place(root)
    async with (
        Child.started("left", ["-m", "amig.bench.hosts"], place) as left,
        Child.started("right", ["-m", "amig.bench.hosts"], place) as right,
    ):
        for child in (left, right):
            await child.line("ready")
        yield Side(left), Side(right)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a process holds."""

    private: int
    """Bytes of memory of its own: RssAnon."""
    shared: int
    """Bytes of guests' memory that it has mapped and touched: RssShmem."""
    descriptors: int
    threads: int
    kinds: dict[str, int]
    """What its descriptors are, for whoever looks for one too many."""

    @classmethod
    def of(cls, pid: int) -> Figures:
        """Look at a process. Source: proc(5)."""
        words = Path(f"/proc/{pid}/status").read_text().split()
        private, shared, threads = (int(words[words.index(w) + 1]) for w in ("RssAnon:", "RssShmem:", "Threads:"))
        kinds: Counter[str] = Counter()
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                kinds[re.sub(r"[0-9]+", "N", os.readlink(descriptor).rpartition("/")[2])] += 1
        count = kinds.total()
        return cls(private=private << 10, shared=shared << 10, descriptors=count, threads=threads, kinds=dict(kinds))


@dataclass
class Mover:
    """A guest that is moved from one side to the other and back."""

    guest: str
    memory: int
    chance: random.Random
    sides: tuple[Side, Side]
    at: int = 0
    socket: str = ""
    host: str = ""
    number: int = 0
    cancelled: int = 0

    async def boot(self, append: str, vcpus: int) -> None:
        """Start the guest on the left."""
        self.host = f"{self.guest}-0"
        command = hosts.HostGuest(name=self.host, memory=self.memory, append=append, vcpus=vcpus)
        self.socket = (await self.sides[0].do(command)).socket
        async with await open_control(self.socket) as control:
            while True:
                found = (await control.status()).guest
                if found is not None and found.state == "running":
                    return
                await asyncio.sleep(0.02)

    async def policy(self, plain: bool) -> amig.Policy:
        """Return options by chance, of those that this host offers; no bandwidth limit when ``plain``."""
        chance = self.chance
        guest = await open_guest(self.socket)
        offered = guest.info.strategies
        await guest.close()
        return amig.Policy(
            dirty_log=chance.choice([*offered, None]),
            chunk=chance.choice([256 << 10, MIB, 2 * MIB, 16 * MIB]),
            chunk_span=chance.choice([None, None, MIB, 64 * MIB]),
            streams=chance.choice([1, 1, 2, 4]),
            compression=chance.choice(["none", "none", "zstd", "auto"]),
            workers=chance.choice([1, 2]),
            bandwidth=None if plain else chance.choice([None, None, 60e6, 400e6]),
            downtime=chance.choice([0.01, 0.05, 0.3]),
            timeout=chance.choice([1.0, 3.0, 10.0]),
            on_timeout="switch",
            connect_timeout=60,
            handover_timeout=60,
        )

    async def move(self, *, cancel: float = 0.25, plain: bool = False) -> dict[str, object]:
        """Move it to the other side; first, with that probability, an attempt that is cancelled somewhere.

        A ``plain`` migration meets no memory that was made ready for it, and has no bandwidth limit. Returns what was
        done. Fails when the guest was damaged, or was left with its log on.
        """
        chance, there = self.chance, self.sides[1 - self.at]
        self.number += 1
        name = f"{self.guest}-{self.number}"
        receive = hosts.Receive(
            name=name,
            memory=0 if plain else chance.choice([0, 0, 0, self.memory, self.memory + 64 * MIB, self.memory // 2]),
            dirty_ring=chance.choice([0, 0, 0, 0, 4096, 65536]),
        )
        address = (await there.do(receive)).address
        cancels = 0
        while chance.random() < cancel:
            if await self._attempt(address, plain, cancel_at=chance.choice([0.0, 0.01, 0.1, 0.4, 1.0])):
                break
            cancels += 1
            await self.stays()
        else:
            assert await self._attempt(address, plain)
        result = self._result
        old = self.host
        self.host, self.socket = name, str(Path(self.socket).with_name(f"{name}.sock"))
        await self.sides[self.at].do(hosts.End(name=old))
        self.at = 1 - self.at
        self.cancelled += cancels
        await self.stays()
        return {
            "number": self.number, "cancelled": cancels, "receive": msgspec.to_builtins(receive),
            "policy": asdict(self._policy), "total_ms": result.total_ms, "downtime_ms": result.downtime_ms,
            "rounds": result.rounds, "sent": result.pages.sent, "resent": result.pages.resent,
        }  # fmt: skip

    async def _attempt(self, address: str, plain: bool, *, cancel_at: float | None = None) -> bool:
        """Migrate; returns whether it moved. ``cancel_at``: seconds after its memory began to go."""
        self._policy = await self.policy(plain)
        loop = asyncio.get_running_loop()

        def on_event(event: amig.Event) -> None:
            if cancel_at is not None and isinstance(event, StateChanged) and event.state is State.MEMORY:
                loop.call_later(cancel_at, migration.cancel)

        migration = amig.Migration(self.socket, address, self._policy, on_event=on_event)
        async with migration:
            pass
        self._result = await migration.result()
        assert self._result.status in ("completed", "cancelled"), self._result
        return self._result.status == "completed"

    async def stays(self) -> None:
        """The guest runs where it is said to be, nobody logs it, and it never found its memory damaged."""
        async with await open_control(self.socket) as control:
            status = await control.status()
            assert status.state is RunState.RUNNING, status
            assert not status.log_users, status
            assert status.guest is not None
            assert not status.guest.mismatches + status.guest.verify_mismatches, status.guest

    async def verify(self) -> int:
        """Have the guest verify all its memory; returns how many pages."""
        async with await open_control(self.socket) as control:
            verdict = await verdict_of(control, TIMEOUT)
        assert verdict.intact, verdict
        return verdict.verified_pages

    async def used(self) -> int:
        """Return the bytes of the guest's memory that are no holes where it is."""
        guest = await open_guest(self.socket)
        try:
            return in_use(guest.memory.fds().values())
        finally:
            await guest.close()


class Watch:
    """Looks at all processes after each migration, and says whether what they hold grows."""

    def __init__(self, sides: tuple[Side, Side]) -> None:
        self._pids = {side.name: side.pid for side in sides} | {"migrator": os.getpid()}
        self.seen: list[dict[str, Figures]] = []

    def look(self) -> dict[str, Figures]:
        """Look once; what waits for the garbage collector in our own process is not held."""
        gc.collect()
        found = {name: Figures.of(pid) for name, pid in self._pids.items()}
        self.seen.append(found)
        return found

    def growth(self, name: str, figure: str) -> tuple[int, int]:
        """Return the least of a figure over the second and over the last quarter of the run.

        The least, because it is taken when a process has no guest, and what waits there for the garbage collector or
        for a peer to hang up comes and goes; what is never given back raises it.
        """
        values = [getattr(found[name], figure) for found in self.seen]
        quarter = len(values) // 4
        return min(values[quarter : 2 * quarter]), min(values[-quarter:])


@contextlib.contextmanager
def record(path: str | None) -> Iterator[Callable[[dict[str, object]], None]]:
    """Yield what writes a line of JSON for whoever looks at a long run."""
    began = time.monotonic()
    with open(path or os.devnull, "a", encoding="utf-8") as file:

        def write(value: dict[str, object]) -> None:
            file.write(json.dumps({"s": round(time.monotonic() - began, 1), **value}, default=asdict) + "\n")
            file.flush()

        yield write
