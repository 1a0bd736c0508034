"""``amig bench losses``: lost pages and needless copies of every design, on real KVM, in the guest's own words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from amig.bench.counting import Copies
from amig.bench.one_loss import Moving, Stage, move
from amig.bench.processes import Processes
from amig.children import Place
from amig.errors import AmigError, UsageError

Tell = Callable[[str], None]
RING_BYTES = 64 << 10
RUN_TIMEOUT = 120.0
"""Seconds for one migration with everything around it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """One way to log."""

    name: str
    strategy: str
    initially_set: bool = True
    ring: int = 0


DESIGNS = (
    Design(name="auto-clear", strategy="auto-clear"),
    Design(name="blind", strategy="blind"),
    Design(name="slot-cache", strategy="slot-cache"),
    Design(name="slot-cache, not initially set", strategy="slot-cache", initially_set=False),
    Design(name="migration-bitmap", strategy="migration-bitmap"),
    Design(name="exact", strategy="exact"),
    Design(name="exact, not initially set", strategy="exact", initially_set=False),
    Design(name="ring", strategy="ring", ring=RING_BYTES),
)
COMPANIES = {
    "alone": Stage(),
    "users": Stage(users=True),
    "all": Stage(users=True, sources=True),
}
"""Who is there beside the migration."""


class Cell(msgspec.Struct, kw_only=True):
    """One design in one company: sums over all migrations."""

    design: str
    company: str
    may_lose: bool
    """What is claimed: whether it may lose pages here."""
    migrations: int = 0
    completed: int = 0
    damaged: int = 0
    """Migrations after which something was lost."""
    pages_lost: int = 0
    """Mismatches that guests found."""
    backend_lost: int = 0
    """Pages of the device backend that are not what it wrote."""
    host_lost: int = 0
    """Migrations in which a write from the host's side got lost."""
    sent: int = 0
    copies: Copies = Copies()
    samples: int = 0
    """Of the meter."""
    looks: int = 0
    """Of the display."""
    touched: int = 0
    """Writes of the device backend to the guest's working set."""
    words: tuple[str, ...] = ()
    """Of the first guest that complained."""
    errors: tuple[str, ...] = ()

    @property
    def as_claimed(self) -> bool:
        """Whether it lost pages if and only if it is said to."""
        if self.may_lose:
            return self.damaged > 0
        return self.damaged == 0 and self.completed == self.migrations


class Losses(msgspec.Struct, frozen=True, kw_only=True):
    """All of it; what the JSON file holds."""

    runs: int
    cells: tuple[Cell, ...]

    @property
    def as_claimed(self) -> bool:
        """Whether every design lost pages if and only if it is said to."""
        return all(cell.as_claimed for cell in self.cells)


def plan(only: Sequence[str], companies: Sequence[str]) -> list[tuple[Design, str]]:
    """Return what to run: all, or the designs whose names begin with one of ``only``. Raises `UsageError`."""
    names = [design.name for design in DESIGNS]
    for word in only:
        if not any(name.startswith(word) for name in names):
            raise UsageError(f"--only {word}: there are {'; '.join(names)}")
    for word in companies:
        if word not in COMPANIES:
            raise UsageError(f"--with {word}: there are {', '.join(COMPANIES)}")
    return [
        (design, company)
        for design in DESIGNS
        for company in (companies or COMPANIES)
        if not only or any(design.name == word or (word not in names and design.name.startswith(word)) for word in only)
    ]


def may_lose(design: Design, company: str) -> bool:
    """Return what is claimed of a design: blind loses always, migration-bitmap when the log has a second user."""
    return design.strategy == "blind" or (design.strategy == "migration-bitmap" and company != "alone")


async def bench(cells: Sequence[tuple[Design, str]], runs: int, tell: Tell) -> Losses:
    """Run every cell ``runs`` times, by turns. Cancelling ends all processes and raises."""
    found = [Cell(design=d.name, company=company, may_lose=may_lose(d, company)) for d, company in cells]
    number = 0
    with Place.temporary() as place:
        async with Processes.started(place) as processes:
            for turn in range(runs):
                for cell, (design, company) in zip(found, cells, strict=True):
                    number += 1
                    await _one(cell, design, COMPANIES[company], number, processes, place.root)
                    if (turn + 1) % 10 == 0 or turn + 1 == runs or cell.damaged == 1 or cell.errors:
                        tell(f"{turn + 1}/{runs}  {in_short(cell)}")
    return Losses(runs=runs, cells=tuple(found))


async def _one(cell: Cell, design: Design, stage: Stage, number: int, processes: Processes, room: Path) -> None:
    cell.migrations += 1
    moving = Moving(
        number=number,
        strategy=design.strategy,
        initially_set=design.initially_set,
        ring=design.ring,
        stage=stage,
        room=room,
    )
    try:
        async with asyncio.timeout(RUN_TIMEOUT):
            moved = await move(moving, processes)
    except (AmigError, TimeoutError) as error:
        cell.errors = (*cell.errors, str(error) or "it hung")[:8]
        return
    cell.completed += 1
    cell.damaged += moved.damaged
    cell.pages_lost += moved.mismatches
    cell.backend_lost += moved.backend_lost
    cell.host_lost += moved.host_lost
    cell.sent += moved.sent
    cell.copies = cell.copies.plus(moved.copies)
    cell.samples += moved.samples
    cell.looks += moved.looks
    cell.touched += moved.touched
    cell.words = cell.words or moved.words
    cell.errors = (*cell.errors, *moved.trouble)[:8]


def in_short(cell: Cell) -> str:
    """Return one cell in one line."""
    copies = cell.copies
    return (
        f"{cell.design:<30} {cell.company:<6} {cell.damaged} of {cell.completed} damaged, {cell.pages_lost} pages; "
        f"needless {copies.needless} to {copies.needless + copies.maybe}, window {copies.window}, of {copies.again} "
        f"sent again of {copies.taken}" + (f"; {cell.errors[-1]}" if cell.errors else "")
    )
