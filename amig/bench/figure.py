"""The report as a picture: total times beside the fluid limit. Needs matplotlib, the extra ``bench``."""

from __future__ import annotations

from pathlib import Path

from amig.bench.summary import Report, Spread
from amig.errors import UsageError

INK, LIGHT, MARK = "#1f4e79", "#9fbad3", "#c0392b"


def available() -> bool:
    """Whether a picture can be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(report: Report, path: Path) -> None:
    """Write an SVG. Raises `UsageError` without matplotlib, or when nothing has completed."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("a plot needs matplotlib: pip install 'amig[bench]'") from None
    rows = [row for row in report.rows if row.total_s is not None][::-1]
    if not rows:
        raise UsageError("no run has completed: there is nothing to plot")
    with rc_context({"svg.hashsalt": "amig", "font.size": 9}):
        figure = Figure(figsize=(8, 1.4 + 0.34 * len(rows)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        places = range(len(rows))
        totals = [row.total_s for row in rows if row.total_s is not None]
        medians = [total.median for total in totals]
        axes.barh(places, medians, color=LIGHT, label="total time, median", zorder=2)
        axes.errorbar(medians, places, xerr=_errors(totals), fmt="none", ecolor=INK, capsize=3, label="least to most",
                      zorder=3)  # fmt: skip
        limits = [(row.limit_s.median, at) for at, row in zip(places, rows, strict=True) if row.limit_s]
        axes.scatter([x for x, _ in limits], [y for _, y in limits], marker="|", s=160, color=MARK, zorder=4,
                     label="fluid limit at the rates achieved")  # fmt: skip
        told = [(row.published_s * report.scale, at) for at, row in zip(places, rows, strict=True) if row.published_s]
        if told:
            axes.scatter([x for x, _ in told], [y for _, y in told], marker="x", color="black", zorder=4,
                         label="published, scaled")  # fmt: skip
        axes.set_yticks(list(places), [row.variant for row in rows])
        axes.set_xlabel("seconds")
        axes.set_xlim(left=0)
        axes.grid(axis="x", alpha=0.3, zorder=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _errors(totals: list[Spread]) -> list[list[float]]:
    return [[t.median - t.low for t in totals], [t.high - t.median for t in totals]]
