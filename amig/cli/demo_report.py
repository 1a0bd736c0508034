"""What the demo found, as one object and as a page for people."""

from __future__ import annotations

import msgspec

from amig.cli.verdict import Verdict, describe
from amig.events import Result
from amig.units import format_duration, format_rate, format_size


class Downtime(msgspec.Struct, frozen=True, kw_only=True):
    """How long the guest stood still, three times measured, in milliseconds."""

    observed: float | None
    """From outside: its heartbeat in both memories, against this machine's clock."""
    uncertain: float | None
    """What the observer may have missed at the two ends of it."""
    sample_us: float
    """How often it looked."""
    before: float | None
    """The longest time without a heartbeat before the switchover."""
    guest_clock: float
    """The longest gap that the guest's own clock saw, from the migration's start on."""
    migrator: float | None
    """From the source's pause to the destination's RUNNING, as the migrator saw them."""
    limit: float


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest wrote, in bytes of pages a second."""

    before: float
    during: float
    after: float
    asked: float


class Report(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="demo"):
    """All of it."""

    status: str
    """``intact``, ``damaged``, or how the migration ended (``failed``, ``cancelled``)."""
    engine: str
    simulated: bool
    memory_bytes: int
    working_set_bytes: int
    vcpus: int
    total_ms: float
    downtime_ms: Downtime | None = None
    progress_bytes_per_s: Progress | None = None
    verdict: Verdict | None = None
    migration: Result


def text(report: Report) -> str:
    """Return the page; every line of a simulated result says so."""
    result = report.migration
    pages, window = result.pages, result.window_ms
    rows = [("total time", format_duration(report.total_ms / 1e3))]
    if report.downtime_ms is not None:
        rows += _downtime(report.downtime_ms)
    rows += [
        ("rounds", str(result.rounds)),
        ("pages", f"{pages.sent} sent, {pages.zero} zero, {pages.resent} sent more than once, of {pages.total}"),
        (
            "bytes",
            f"{format_size(result.bytes.memory)} of memory, {format_size(result.bytes.wire)} on the wire, "
            f"{result.streams} connection{'s' * (result.streams > 1)}, compression {result.compression}",
        ),
        ("link", f"{format_rate(result.link_bytes_per_s)} while sending"),
        (
            "clear to read",
            f"{_ms(window.p50)} (p50), {_ms(window.p99)} (p99), {_ms(window.max)} (most), {result.dirty_log}, "
            f"chunks of {format_size(result.chunk_bytes)}",
        ),
    ]
    if report.progress_bytes_per_s is not None:
        speed = report.progress_bytes_per_s
        asked = format_rate(speed.asked) if speed.asked else "all it can"
        rows.append(
            (
                "guest wrote",
                f"{format_rate(speed.before)} before, {format_rate(speed.during)} during, "
                f"{format_rate(speed.after)} after (asked for {asked})",
            )
        )
    if report.verdict is not None:
        rows.append(("verdict", describe(report.verdict)))
    mark = "simulated: " if report.simulated else ""
    return "\n".join(f"  {mark}{name:14}{value}" for name, value in rows)


def _downtime(downtime: Downtime) -> list[tuple[str, str]]:
    if downtime.observed is None:
        outside = "not seen from outside"
    else:
        outside = (
            f"{_ms(downtime.observed)} seen from outside (+-{_ms(downtime.uncertain or 0)}; looked every "
            f"{downtime.sample_us:.0f} us; longest before: {_ms(downtime.before or 0)})"
        )
    inside = f"{_ms(downtime.guest_clock)} longest gap on the guest's own clock"
    between = "" if downtime.migrator is None else f", {_ms(downtime.migrator)} from pause to running"
    return [("downtime", outside), ("", f"{inside}{between}, limit {_ms(downtime.limit)}")]


def _ms(value: float) -> str:
    return format_duration(value / 1e3)
