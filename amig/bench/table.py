"""The report as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from amig.bench.summary import Report, Row, Spread
from amig.units import format_duration, format_rate, format_size


def markdown(report: Report) -> str:
    """Return the page: what was run, the times, what the log cost."""
    used = report.used
    lines = [
        f"Guest of {format_size(used['memory_bytes'])}, {format_size(used['working_set_bytes'])} of it written at "
        f"random, one byte a page, at {format_rate(used['rate_bytes_per_s'])} of pages; link capped at "
        f"{format_rate(used['link_bytes_per_s'])}, downtime limit {format_duration(used['downtime_s'])}, no "
        f"compression; the published scenario at scale {report.scale:g}. Medians of completed runs, with the least and "
        "the most in brackets; runs of all variants by turns.",
        "",
        *(f"**Note:** {note}.\n" for note in report.notes),
        *times(report.rows, report.scale),
        "",
        "*Limit*: the fluid limit for the link and the write rate that each run really had, memory outside of the "
        "working set first. *Published*: Peter Xu's total time, times the scale. *Downtime*: from outside, by the "
        "guest's heartbeat in both memories. *Window*: from the start of a chunk's clear to the last byte read.",
        "",
        *costs(report.rows),
        "",
        "*Guest*: pages written a second during the migration, by those before it. *Log on*: to switch the log on and "
        "learn what it starts with. *Link*: while really sending; *pace*: pages sent by the total time. GET and CLEAR: "
        "time in these ioctls (for the ring: what stands for them).",
    ]
    states = [f"- {row.variant}: {row.state}" for row in report.rows if row.state]
    if states:
        lines += ["", "Runs that did not complete:", "", *states]
    return "\n".join(lines) + "\n"


def times(rows: Sequence[Row], scale: float) -> list[str]:
    """Return the table that was published, and what we add to it."""
    head = (
        "",
        "published",
        "total s",
        "limit s",
        "by limit",
        "pages sent",
        "twice",
        "rounds",
        "window ms",
        "downtime ms",
    )
    body = []
    for row in rows:
        claimed = "" if row.published_s is None else f"{row.published_s * scale:.3g}"
        some = "" if row.completed == row.runs else f", {row.completed} of {row.runs} runs"
        body.append(
            (
                row.variant,
                claimed,
                show(row.total_s, 2) + some if row.completed else f"none of {row.runs} runs",
                show(row.limit_s, 2),
                show(row.over_limit, 2),
                show(row.pages),
                show(row.twice, brief=True),
                show(row.rounds, brief=True),
                show(row.window_p50_ms, 2, brief=True),
                show(row.downtime_ms, 1),
            )
        )
    return table(head, body)


def costs(rows: Sequence[Row]) -> list[str]:
    """Return what logging costs host and guest."""
    head = (
        "",
        "guest",
        "wrote MB/s",
        "link MB/s",
        "pace MB/s",
        "log on ms",
        "GET µs",
        "CLEARs",
        "CLEAR ms",
        "ns a page",
        "ring full",
    )
    body = [
        (
            row.variant,
            show(row.progress, 3),
            show(row.write_mb_s),
            show(row.link_mb_s),
            show(row.pace_mb_s),
            show(row.log_start_ms, 2),
            show(row.get_us),
            show(row.clears, brief=True),
            show(row.clear_ms, 1),
            show(row.clear_ns_page),
            show(row.ring_full, brief=True) if row.variant.startswith("ring") else "",
        )
        for row in rows
        if row.write_mb_s is not None
    ]
    return table(head, body)


def show(value: Spread | None, places: int = 0, *, brief: bool = False) -> str:
    """Return ``median (low to high)``; ``brief``: the median alone."""
    if value is None:
        return ""
    if brief or value.low == value.high:
        return f"{value.median:.{places}f}"
    return f"{value.median:.{places}f} ({value.low:.{places}f}–{value.high:.{places}f})"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table, its first column to the left and the others to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, *body)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(head))]
    rule = ["-" * (width + 1) + (":" if at else "-") for at, width in enumerate(widths)]
    lines = [_line(row, widths) for row in rows]
    return [lines[0], "|" + "|".join(rule) + "|", *lines[1:]]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [c.rjust(width) if at else c.ljust(width) for at, (c, width) in enumerate(zip(cells, widths, strict=True))]
    return "| " + " | ".join(padded) + " |"
