"""``amig bench``: measurements that anybody can run again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amig.cli import options, say
from amig.cli.app import app, command
from amig.errors import UsageError

if TYPE_CHECKING:
    from amig.bench.losses import Losses
    from amig.bench.summary import Report

group = typer.Typer(help="Measure, on real KVM.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(group, name="bench")

Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Write the report there too: Markdown, JSON and a plot.")
]
Page = Annotated[
    Path | None,
    typer.Option(
        "--page",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Put the tables into this Markdown page, between its marks.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="NAME", help="Only this one, or those that begin so; may be given again."),
]


@command(
    "amig bench dirty-log",
    "amig bench dirty-log --scale 0.02 --runs 1 --only slot-cache --only auto-clear",
    "amig bench dirty-log --runs 5 --out docs/measured --page docs/dirty-log.md",
    name="dirty-log",
    group=group,
)
def dirty_log(
    scale: Annotated[float, typer.Option("--scale", help="Of memory and downtime; 1 is a guest of 13 GiB.")] = 0.1,
    runs: Annotated[int, typer.Option("--runs", min=1, max=100, help="Of each variant, by turns.")] = 5,
    only: Only = None,
    every: Annotated[bool, typer.Option("--every", help="Fixed chunk spans with every design.")] = False,
    fill_rest: Annotated[
        bool, typer.Option("--fill-rest", help="The memory that is not written at random holds data, too.")
    ] = False,
    rate: Annotated[str, typer.Option("--rate", metavar="RATE", help="What the guest writes.")] = "900MB/s",
    bandwidth: Annotated[str, typer.Option("--bandwidth", metavar="RATE", help="The link's cap.")] = "1250MB/s",
    downtime: Annotated[
        str | None, typer.Option("--downtime", metavar="TIME", help="The limit; else 100 ms times the scale.")
    ] = None,
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="TIME", help="When a run counts as one that does not converge.")
    ] = "30s",
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate/--no-calibrate", help="Slow both rates down to what this machine holds, and say so."),
    ] = True,
    out: Out = None,
    page: Page = None,
    json: options.Json = False,
) -> None:
    """Run the published dirty-log scenario with every design and chunk size.

    A guest writes memory at random while it moves between two processes of this machine. The table has total time
    beside the fluid limit at the link and write rates that each run really had, pages sent, window, downtime seen from
    outside, and what GET, CLEAR and the log cost host and guest.
    """
    from dataclasses import replace

    from amig.bench.dirty_log import Request
    from amig.bench.scenario import Scenario, choose

    scenario = replace(
        Scenario.published(scale),
        fill_rest=fill_rest,
        rate=options.rate("--rate", rate) or 0,
        link=options.rate("--bandwidth", bandwidth) or 0,
    )
    if downtime is not None:
        scenario = replace(scenario, downtime=options.seconds("--downtime", downtime))
    if not scenario.rate or not scenario.link:
        raise UsageError("--rate and --bandwidth have to be limited: the fluid limit is of two rates")
    request = Request(
        scenario=scenario,
        variants=choose(only or [], every=every),
        runs=runs,
        timeout=options.seconds("--timeout", timeout),
        scale=scale,
        calibrate=calibrate,
    )
    _need_kvm()
    raise typer.Exit(_ended(_dirty_log(request, out, page, json=json)))


async def _dirty_log(request: object, out: Path | None, page: Path | None, *, json: bool) -> int:
    from amig.bench.dirty_log import Request, bench
    from amig.bench.files import insert
    from amig.bench.table import markdown

    assert isinstance(request, Request)  # noqa: S101 - typed loosely, to be imported late

    def keep(report: Report) -> None:
        if out is not None:
            _write_report(report, out)

    report = await bench(request, say.note, keep)
    if page is not None:
        await asyncio.to_thread(insert, page, "dirty-log", markdown(report))
    if json:
        say.json_line(report)
    else:
        say.result(markdown(report))
    return 0 if all(row.completed for row in report.rows) else 1


def _write_report(report: Report, out: Path) -> None:
    from amig.bench import figure
    from amig.bench.files import write
    from amig.bench.table import markdown

    write(out, "dirty-log", markdown(report), report)
    if not figure.available():
        say.note("no plot: that needs matplotlib (pip install 'amig[bench]')")
    elif any(row.total_s is not None for row in report.rows):
        figure.draw(report, out / "dirty-log.svg")


@command(
    "amig bench losses",
    "amig bench losses --runs 5 --only blind --only exact",
    "amig bench losses --out docs/measured --page docs/dirty-log.md",
    name="losses",
    group=group,
)
def losses(
    runs: Annotated[int, typer.Option("--runs", min=1, max=10_000, help="Migrations of each kind.")] = 50,
    only: Only = None,
    company: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="WHO", help="Only with this company: alone, users, all; may be given again."),
    ] = None,
    out: Out = None,
    page: Page = None,
    json: options.Json = False,
) -> None:
    """Count lost pages and needless copies of every dirty-log design.

    Moves small guests that check their own memory, alone and with other users and sources of the dirty log: a
    dirty-rate meter, a display that is slow to draw, a device backend in another process, writes from the host's side.
    The designs that are known to lose pages, blind and migration-bitmap, run here, too: with guests that nobody needs.
    """
    from amig.bench.files import insert
    from amig.bench.losses import bench, plan
    from amig.bench.losses_table import markdown

    cells = plan(only or [], company or [])
    _need_kvm()

    async def main() -> int:
        found = await bench(cells, runs, say.note)
        if out is not None:
            await asyncio.to_thread(_write_losses, found, out)
        if page is not None:
            await asyncio.to_thread(insert, page, "losses", markdown(found))
        if json:
            say.json_line(found)
        else:
            say.result(markdown(found))
        return 0 if found.as_claimed else 1

    raise typer.Exit(_ended(main()))


def _write_losses(found: Losses, out: Path) -> None:
    from amig.bench.files import write
    from amig.bench.losses_table import markdown

    write(out, "losses", markdown(found), found)


def _need_kvm() -> None:
    from amig.kvm.system import Kvm

    Kvm.open().close()


def _ended(main: object) -> int:
    """Run a bench; SIGINT, SIGTERM and SIGHUP end it, and everything that it has started."""
    import signal
    from collections.abc import Coroutine

    from amig.cli.loop import on_signals, run

    async def body() -> int:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - we run in one
        by: list[signal.Signals] = []

        def stop(number: signal.Signals) -> None:
            by.append(number)
            if len(by) == 1:
                task.cancel()
            say.note("amig: ending the bench")

        assert isinstance(main, Coroutine)  # noqa: S101 - as the callers have it
        try:
            with on_signals(stop):
                return int(await main)
        except asyncio.CancelledError:
            if not by:
                raise
            return 128 + by[0]

    return run(body())
