"""A way through the model, as text: who does what, and how things stand after it."""

from __future__ import annotations

from collections.abc import Callable

from amig.sim.proof.moves import name_pages
from amig.sim.proof.page import Page, misses_a_write
from amig.sim.proof.rules import Rules
from amig.sim.proof.search import LATE, LOST, MARK, MAYBE, NEEDLESS, WINDOW, Found

ENDS = {
    LOST: "the destination runs, and {} is not there as the source had left it",
    NEEDLESS: "nothing wrote {} since the clear before its last read: this copy is needless",
    MARK: "{} was written, and a user will never hear of it",
    WINDOW: "{} was written between its clear and its read: it is sent once more",
    LATE: "the mark of {} came after its write had been sent: it is sent once more",
    MAYBE: "{} is pending for a user although nothing wrote it since that user's last take",
}
"""What the last step of a trace shows; ``{}`` for the pages."""

Column = tuple[str, Callable[[Page], str]]


def _bit(name: str) -> Callable[[Page], str]:
    return lambda page: "1" if getattr(page, name) else "."


def _way(page: Page) -> str:
    if page.taken:
        return "t"
    if page.flying:
        return "s"
    return "r" if page.unread else "p" if page.unacked else "."


def _log(page: Page) -> str:
    return "r" if page.returned else "1" if page.kernel else "k" if page.kept else "b" if page.buffered else "."


def _columns(rules: Rules) -> list[Column]:
    columns: list[Column] = [("ring" if rules.ring else "kernel", _log)]
    if rules.strategy.manual:
        columns.append(("C", _bit("cache")))
    columns.append(("migration", _bit("pending")))
    if rules.users > 1:
        columns.append(("display", _bit("pending1")))
    if rules.users > 2:
        columns.append(("meter", _bit("pending2")))
    if rules.external:
        columns.append(("unmarked", _bit("unmarked")))
    return [*columns, ("under way", _way), ("destination", lambda page: "!" if page.stale else "=")]


def legend(rules: Rules) -> str:
    """Say what the columns of a trace mean."""
    bitmap = "kernel: set in the log"
    ring = "ring: b in the CPU's buffer, 1 has an entry, r that a GET has returned, k was reset and is kept for a GET"
    log = ring if rules.ring else bitmap
    parts = [f"One character a page. {log}"]
    if rules.strategy.manual:
        parts.append("C: known to be set in the kernel")
    parts.append("migration, display, meter: pending for that user")
    if rules.external:
        parts.append("unmarked: written by another source that has not said so yet")
    parts.append("under way: t taken, s read and sent, p placed and not acknowledged")
    parts.append("destination: = same as memory, ! not")
    return "; ".join(parts) + "."


def draw(found: Found, what: str) -> list[str]:
    """Return the lines of the shortest way to an event, aligned."""
    columns = _columns(found.rules)
    moments = found.traces[what]
    rows = [("", "", "", *(title for title, _ in columns))]
    # Where the display was first, the first moment has the state that all begins with.
    if not moments or moments[0].move.text != "switches the log on":
        rows.append(("", "", "log on, everything pending", *_state(columns, found.start)))
    for number, moment in enumerate(moments, 1):
        rows.append((str(number), moment.move.actor, moment.move.told(), *_state(columns, moment.pages)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, f"=> {_end(found, what)}"]


def _state(columns: list[Column], pages: tuple[Page, ...]) -> list[str]:
    return ["".join(show(page) for page in pages) for _, show in columns]


def _end(found: Found, what: str) -> str:
    moments = found.traces[what]
    last = moments[-1] if moments else None
    pages = last.pages if last else found.start
    before = moments[-2].pages if len(moments) > 1 else found.start
    concerned = range(found.pages)
    if what == LOST:
        hit = [i for i in concerned if pages[i].stale]
    elif what == MARK:
        hit = [i for i in concerned if misses_a_write(pages[i])]
    else:
        hit = [i for i in (last.move.pages if last else concerned) if before[i] != pages[i]]
    return ENDS[what].format(name_pages(hit or [0]))
