"""What the losses bench found, as Markdown. Pure."""

from __future__ import annotations

from amig.bench.losses import COMPANIES, Cell, Losses
from amig.bench.table import table

_COMPANY = {
    "alone": "the migration alone",
    "users": "and a dirty-rate meter, and a display",
    "all": "and a device backend, and writes from the host's side",
}


def markdown(found: Losses) -> str:
    """Return the page: lost pages, then copies, then the guests' own words."""
    lines = [
        f"{found.runs} migrations of each kind, of guests that check their own memory, on real KVM.",
        "",
        *losses(found.cells),
        "",
        "*" + "; ".join(f"{name}: {_COMPANY[name]}" for name in COMPANIES) + ".* Given is how many migrations lost "
        "something, and in brackets how many pages the guests found wrong. A device backend's own pages and the host's "
        "own writes are compared, too.",
        "",
        *copies(found.cells),
        "",
        "*Needless*: sent again though nothing had written them after the clear that preceded their last read; the "
        "second figure includes those that may have been written in the 0.1 ms of a take. *Window*: written between "
        "clear and read and not since, at most. *Late*: sent again for the mark of an external write, which came after "
        "the page had been read with it. Pages of the working set only.",
    ]
    words = [(cell, line) for cell in found.cells for line in cell.words[:1]]
    if words:
        lines += ["", "In the guests' own words:", ""]
        lines += [f"    {cell.design}, {cell.company}: {line}" for cell, line in words]
    errors = [(cell, text) for cell in found.cells for text in cell.errors]
    if errors:
        lines += ["", "What went wrong beside:", ""]
        lines += [f"- {cell.design}, {cell.company}: {text}" for cell, text in errors]
    return "\n".join(lines) + "\n"


def losses(cells: tuple[Cell, ...]) -> list[str]:
    """Return the table design × company of migrations that lost something."""
    names = list(dict.fromkeys(cell.design for cell in cells))
    companies = [name for name in COMPANIES if any(cell.company == name for cell in cells)]
    by = {(cell.design, cell.company): cell for cell in cells}
    body = [
        (name, *(_lost(by[name, company]) if (name, company) in by else "" for company in companies)) for name in names
    ]
    return table(("", *companies), body)


def _lost(cell: Cell) -> str:
    if not cell.completed:
        return "none completed"
    text = f"{cell.damaged} of {cell.completed}"
    extra = f" ({cell.pages_lost + cell.backend_lost} pages)" if cell.damaged else ""
    return text + extra + ("" if cell.completed == cell.migrations else f", {cell.migrations - cell.completed} failed")


def copies(cells: tuple[Cell, ...]) -> list[str]:
    """Return the table of copies, each by a hundred pages of the working set that were sent."""
    head = ("", "company", "taken", "again", "needless", "%", "window", "%", "late")
    body = []
    for cell in cells:
        found = cell.copies
        most = found.needless + found.maybe
        of = max(found.taken, 1)
        body.append(
            (
                cell.design,
                cell.company,
                str(found.taken),
                str(found.again),
                f"{found.needless} – {most}",
                f"{100 * found.needless / of:.2f} – {100 * most / of:.2f}",
                str(found.window),
                f"{100 * found.window / of:.2f}",
                str(found.late),
            )
        )
    return table(head, body)
