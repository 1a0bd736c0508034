"""``amig prove``: what each dirty-log design can do to a page, by searching every interleaving of a model."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amig.cli import say
from amig.cli.app import command

if TYPE_CHECKING:
    from rich.console import RenderableType

    from amig.sim.proof.copies import Copies
    from amig.sim.proof.verdicts import Refuted, Verdict

MODEL = "This is the model of a page, searched; nothing here was measured, and no KVM was asked."

NOTES = """\
needless: sent again, although nothing wrote it since the clear before its last read. Counted apart are copies for
marks of another source that came late (late), and pages that a user other than the migration is told of although
nothing wrote them (maybe). In every design a page written between its clear and its read goes once more: that window
is from {windows}.
"""
WIDTH = 124
"""Columns that the table needs."""


@command(
    "amig prove",
    "amig prove --strategy exact --strategy migration-bitmap",
    "amig prove --strategy exact --pages 3 --depth 14 --json",
)
def prove(
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", metavar="NAME", help="Only this design; may be given several times."),
    ] = None,
    pages: Annotated[int, typer.Option(min=1, max=3, help="Pages of the guest.")] = 2,
    users: Annotated[
        int, typer.Option(min=1, max=3, help="Up to so many users of the log: migration, display, meter.")
    ] = 2,
    depth: Annotated[
        int, typer.Option(min=1, max=1000, help="Search no further than so many steps; the searches end before 40.")
    ] = 1000,
    rules: Annotated[bool, typer.Option("--rules/--no-rules", help="Also break each rule and show the harm.")] = True,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Show which dirty-log designs lose pages, send pages needlessly or hide writes from other users.

    Every order is tried in which a guest, another source, users of the log, a migration and its failures can act on a
    few pages; the strategies are the very code that runs on KVM. For each kind of harm the shortest way to it is
    printed. docs/dirty-log.md tells the story.

    With two pages it takes about a minute; three pages need a --depth.
    """
    from amig.errors import UsageError
    from amig.sim.proof.copies import CHUNKS, COUNTED, count
    from amig.sim.proof.rules import BROKEN, DESIGNS
    from amig.sim.proof.verdicts import refute, verdicts

    designs = tuple(strategy or DESIGNS)
    for name in designs:
        if name not in DESIGNS:
            raise UsageError(f"no design is called {name!r}: there are {', '.join(DESIGNS)}")
    note = say.note if not json else lambda text: None
    found = []
    for verdict in verdicts(designs, pages=pages, users=users, depth=depth):
        found.append(verdict)
        note(f"{verdict.design}, {verdict.users} user{'s' * (verdict.users > 1)}, {verdict.sources}: {_short(verdict)}")
    counted = [
        count(name, chunk, disturbed=disturbed)
        for name in designs
        if name in COUNTED
        for disturbed in (False, True)
        for chunk in CHUNKS
    ]
    harms = [refute(broken) for broken, design in BROKEN.items() if design in designs] if rules else []
    if json:
        say.json_line(_object(found, counted, harms, pages))
    else:
        _show(found, counted, harms, pages)


def _short(verdict: Verdict) -> str:
    return f"{verdict.states} states, {verdict.depth} steps, {verdict.seconds:.1f} s"


def _show(found: list[Verdict], counted: list[Copies], harms: list[Refuted], pages: int) -> None:
    from rich.console import Console

    from amig.sim.proof.verdicts import window_of

    console = Console(file=sys.stdout, highlight=False, markup=False)
    console.width = max(console.width, WIDTH)

    def put(what: RenderableType = "") -> None:
        console.print(what)

    put(_table(found))
    states, seconds = sum(row.states for row in found), sum(row.seconds for row in found)
    whole = "every reachable state" if all(row.complete for row in found) else "NOT every reachable state"
    windows = dict.fromkeys(f"{window_of(row.design)} ({row.design})" for row in found)
    put(NOTES.format(windows=", ".join(windows)))
    put(f"{pages} page{'s' * (pages > 1)}; {states} states in {seconds:.0f} s: {whole}. {MODEL}")
    for lines in _traces(found, pages):
        put()
        for line in lines:
            console.print(line, soft_wrap=True)
    if counted:
        put()
        put(_copies(counted))
    for harm in harms:
        put()
        for line in _harm(harm):
            console.print(line, soft_wrap=True)


def _table(found: Iterable[Verdict]) -> RenderableType:
    from rich import box
    from rich.table import Table

    from amig.sim.proof.search import LATE, LOST, MARK, MAYBE, NEEDLESS

    table = Table(box=box.SIMPLE, title="What can happen")
    for title in ("design", "users", "sources", "lost page", "needless copy", "lost mark"):
        table.add_column(title, no_wrap=True)
    for title in ("late", "maybe", "states", "s"):
        table.add_column(title, justify="right" if title in ("states", "s") else "left", style="dim", no_wrap=True)
    for row in found:
        words = [_colour(row.word(what)) for what in (LOST, NEEDLESS, MARK)]
        apart = [row.word(what) for what in (LATE, MAYBE)]
        table.add_row(
            row.design,
            str(row.users),
            row.sources,
            *words,
            *apart,
            str(row.states),
            f"{row.seconds:.1f}",
        )
    return table


def _colour(word: str) -> Any:
    from rich.text import Text

    return Text(word, style="green" if word == "never" else "yellow" if word == "not found" else "bold red")


def _copies(counted: Iterable[Copies]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title="Copies, counted: pages sent again per 1000 sent for the first time")
    for title in (
        "design",
        "display and another source",
        "pages a chunk",
        "needed",
        "written in the window",
        "needless",
    ):
        table.add_column(title, justify="left" if title == "design" else "right")
    for row in counted:
        per = [f"{1000 * number / row.first:.0f}" for number in (row.needed, row.window, row.needless)]
        table.add_row(row.design, "yes" if row.disturbed else "no", str(row.chunk), *per)
    return table


def _traces(found: list[Verdict], pages: int) -> Iterable[list[str]]:
    from amig.sim.proof.search import PROPERTIES
    from amig.sim.proof.trace import draw, legend
    from amig.sim.proof.verdicts import shortest

    told = False
    seen = set()
    for row in found:
        for what in PROPERTIES:
            if what in row.happens and (row.design, what) not in seen:
                seen.add((row.design, what))
                way = shortest(row, what, pages=pages)
                if not told:
                    yield [legend(way.rules)]
                    told = True
                yield [f"{row.design}: {what}", *draw(way, what)]


def _harm(harm: Refuted) -> list[str]:
    from amig.sim.proof.rules import BROKEN
    from amig.sim.proof.trace import draw

    title = f"rule broken on purpose, {harm.broken} ({BROKEN[harm.broken]}): {harm.what}"
    return [title, *draw(harm.found, harm.what)]


def _object(found: list[Verdict], counted: list[Copies], harms: list[Refuted], pages: int) -> dict[str, Any]:
    from amig.sim.proof.search import PROPERTIES
    from amig.sim.proof.trace import draw
    from amig.sim.proof.verdicts import shortest

    rows = []
    for row in found:
        traces = {what: draw(shortest(row, what, pages=pages), what) for what in PROPERTIES if what in row.happens}
        rows.append(asdict(row) | {"sources": row.sources, "traces": traces})
    return {
        "model": MODEL,
        "pages": pages,
        "verdicts": rows,
        "copies": [asdict(row) for row in counted],
        "rules": [
            {"broken": str(harm.broken), "design": harm.found.rules.design, "harm": harm.what, "trace": _harm(harm)[1:]}
            for harm in harms
        ],
    }
