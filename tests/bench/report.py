"""The report as Markdown, and as a picture. Pure but for the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amig.bench.summary import Spread
from amig.bench.table import show, table
from tests.bench.summary import Finding, Report, Row

LEGEND = (
    "*Total*: from the command (for amig the start of the process `amig migrate`, of it *start* until the migration "
    "began; for QEMU a line to its monitor) to the guest's first beat over there. *By this*: the first row's total "
    "time by this row's, pair by pair. *Downtime*: from outside, from the last beat here to the first one there. "
    "*Guest*: pages it wrote a second from the command until it ran over there, by those it wrote before. *CPU*: "
    "seconds of all processes of a side, without the vCPU. *Memory*: private, beside the guest's, at its most."
)


def markdown(report: Report) -> str:
    """Return the part of a page that is about one scenario."""
    setting = ", ".join(f"{name} {value}" for name, value in report.setting.items() if name != "guest")
    lines = [
        f"{report.scenario}: {report.title}. {setting[0].upper()}{setting[1:]}; guest: `{report.setting['guest']}`.",
        "",
        "; ".join(f"{name}: {value}" for name, value in report.machine.items()) + ".",
    ]
    for preallocated in sorted({row.preallocated for row in report.rows}):
        rows = [row for row in report.rows if row.preallocated == preallocated]
        lines += ["", f"Destinations {where(preallocated=preallocated)}:", "", *results(rows)]
        trouble = [f"- {row.mode}: {row.runs - row.whole} of {row.runs} runs: {t}" for row in rows for t in row.trouble]
        if trouble:
            lines += ["", "Runs that did not end well:", "", *trouble]
    if report.findings:
        lines += ["", *targets(report.findings)]
    return "\n".join(lines) + "\n"


def where(*, preallocated: bool) -> str:
    """Return what kind of destination it was."""
    return "with their memory populated beforehand" if preallocated else "that populate their memory as it arrives"


def kind(*, preallocated: bool) -> str:
    """Return the same as a word in a table."""
    return "populated" if preallocated else "as it arrives"


def results(rows: Sequence[Row]) -> list[str]:
    """Return the table of all modes."""
    head = (
        "", "total s", "start", "by this", "downtime ms", "guest", "pages", "wire MiB", "rounds", "MB/s",
        "CPU source", "CPU dest.", "s/GiB", "memory MiB",
    )  # fmt: skip
    body = []
    for row in rows:
        some = "" if row.whole == row.runs else f", {row.whole} of {row.runs} runs"
        body.append(
            (
                row.mode,
                show(row.total_s, 2) + some if row.whole else f"none of {row.runs} runs",
                show(row.start_s, 2, brief=True) if row.side == "amig" else "",
                show(row.ratio, 2),
                show(row.downtime_ms, 1),
                show(row.progress, 2),
                show(row.pages_sent, brief=True),
                show(row.wire_mib, brief=True),
                show(row.rounds, brief=True),
                show(row.pace_mb_s, brief=True),
                show(row.cpu_source_s, 2, brief=True),
                show(row.cpu_destination_s, 2, brief=True),
                show(row.cpu_gib_s, 2),
                _both(row.source_mib, row.destination_mib),
            )
        )
    return table(head, body)


def _both(source: Spread | None, destination: Spread | None) -> str:
    return "" if source is None or destination is None else f"{source.median:.0f} + {destination.median:.0f}"


def targets(findings: Sequence[Finding]) -> list[str]:
    """Return the table of what was aimed at."""
    head = ("target", "destination", "at most", "found", "", "without the start")
    body = [
        (
            finding.text,
            kind(preallocated=finding.preallocated),
            f"{finding.wanted:.2f}",
            show(finding.found, 2) or "not measured",
            {True: "met", False: "**missed**", None: ""}[finding.met],
            show(finding.loaded, 2),
        )
        for finding in findings
    ]
    return table(head, body)


def draw(report: Report, path: Path) -> None:
    """Write total times and downtimes as an SVG. Raises `ImportError` without matplotlib."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.total_s is not None][::-1]
    with rc_context({"svg.hashsalt": "amig", "font.size": 9}):
        figure = Figure(figsize=(9, 1.3 + 0.34 * len(rows)), layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
        places = range(len(rows))
        colours = ["#1f4e79" if row.side == "amig" else "#9fbad3" for row in rows]
        for axes, name, unit in ((left, "total_s", "total time, s"), (right, "downtime_ms", "downtime, ms")):
            spreads: list[Spread | None] = [getattr(row, name) for row in rows]
            medians = [s.median if s else 0.0 for s in spreads]
            low = [s.median - s.low if s else 0.0 for s in spreads]
            high = [s.high - s.median if s else 0.0 for s in spreads]
            axes.barh(places, medians, color=colours, zorder=2)
            axes.errorbar(medians, places, xerr=[low, high], fmt="none", ecolor="black", capsize=3, zorder=3)
            axes.set_xlabel(f"{unit} (median; least to most)")
            axes.set_xlim(left=0)
            axes.grid(axis="x", alpha=0.3, zorder=0)
        left.set_yticks(list(places), [f"{row.mode}{', populated' * row.preallocated}" for row in rows])
        figure.suptitle(f"{report.scenario}: {report.title}")
        figure.savefig(path, format="svg", metadata={"Date": None})
