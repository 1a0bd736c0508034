"""``amig migrate``: moves a guest, or writes it to a file."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amig.cli import options, say
from amig.cli.app import command
from amig.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from amig.events import Result
    from amig.policy import Policy

_LIMITS = "Limits"
_STREAM = "Stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be moved."""

    source: str
    destination: str
    policy: Policy
    stop: bool
    log: Path | None
    json: bool


@command(
    "amig migrate web1 tcp://hostb:7000 --downtime 50ms --bandwidth 500MB/s",
    "amig migrate web1 tcp://hostb:7000 --streams 2 --compression zstd --timeout 5min --on-timeout switch",
    "amig migrate web1 file:/backup/web1.snapshot",
    "amig migrate file:/backup/web1.snapshot tcp://hostb:7000",
)
def migrate(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A guest's name, the path of its control socket, or file:PATH.")
    ],
    destination: Annotated[str, typer.Argument(metavar="DST", help="tcp://HOST:PORT, unix:PATH, or file:PATH.")],
    bandwidth: Annotated[
        str, typer.Option("--bandwidth", metavar="RATE", help="Most bytes a second.", rich_help_panel=_LIMITS)
    ] = "unlimited",
    downtime: Annotated[
        str, typer.Option("--downtime", metavar="TIME", help="How long it may stand still.", rich_help_panel=_LIMITS)
    ] = "100ms",
    max_rounds: Annotated[
        int, typer.Option("--max-rounds", help="Rounds before --on-timeout applies.", rich_help_panel=_LIMITS)
    ] = 100,
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", metavar="TIME", help="Time before --on-timeout applies.", rich_help_panel=_LIMITS),
    ] = None,
    on_timeout: Annotated[
        options.OnTimeout,
        typer.Option(
            "--on-timeout",
            help="cancel: the guest stays. switch: it moves with whatever downtime that takes.",
            rich_help_panel=_LIMITS,
        ),
    ] = options.OnTimeout.CANCEL,
    connect_timeout: Annotated[
        str,
        typer.Option("--connect-timeout", metavar="TIME", help="For connecting, each.", rich_help_panel=_LIMITS),
    ] = "10s",
    handover_timeout: Annotated[
        str,
        typer.Option(
            "--handover-timeout", metavar="TIME", help="For each answer at the switchover.", rich_help_panel=_LIMITS
        ),
    ] = "30s",
    compression: Annotated[
        options.Compression, typer.Option("--compression", help="Of pages.", rich_help_panel=_STREAM)
    ] = options.Compression.NONE,
    level: Annotated[int, typer.Option("--level", help="Of zstd, 1 to 19.", rich_help_panel=_STREAM)] = 1,
    workers: Annotated[int, typer.Option("--workers", help="Threads that compress.", rich_help_panel=_STREAM)] = 1,
    streams: Annotated[
        int, typer.Option("--streams", help="Connections that carry memory.", rich_help_panel=_STREAM)
    ] = 1,
    chunk: Annotated[
        str,
        typer.Option("--chunk", metavar="SIZE", help="Dirty bytes cleared and read at once.", rich_help_panel=_STREAM),
    ] = "1MiB",
    chunk_span: Annotated[
        str | None,
        typer.Option("--chunk-span", metavar="SIZE", help="Most address range of a chunk.", rich_help_panel=_STREAM),
    ] = None,
    dirty_log: Annotated[
        str | None,
        typer.Option(
            "--dirty-log", metavar="STRATEGY", help="slot-cache or auto-clear; else the best.", rich_help_panel=_STREAM
        ),
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="With a file: the guest doesn't run on.")] = False,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Append all events to a file, as JSON lines.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Move a running guest to another host, or write it to a file.

    DST is where amig receive listens. The guest runs on here while its memory is sent, again and again what it wrote
    meanwhile, until the rest fits the downtime; then it is paused, and goes on over there. Whatever fails before the
    other side has everything, it runs on here. Ctrl-C, or amig cancel NAME, keeps it here.

    A migration to a file is a live snapshot: the guest runs on (with --stop it doesn't), and the file appears when it
    is whole. A file can be SRC, too.
    """
    from amig.cli.caution import plain_tcp
    from amig.cli.loop import run as run_loop
    from amig.policy import Policy
    from amig.transport.address import parse

    policy = Policy(
        bandwidth=options.rate("--bandwidth", bandwidth),
        downtime=options.seconds("--downtime", downtime),
        max_rounds=max_rounds,
        timeout=None if timeout is None else options.seconds("--timeout", timeout),
        on_timeout=on_timeout.value,
        chunk=options.size("--chunk", chunk),
        chunk_span=None if chunk_span is None else options.size("--chunk-span", chunk_span),
        dirty_log=dirty_log,
        compression=compression.value,
        level=level,
        workers=workers,
        streams=streams,
        connect_timeout=options.seconds("--connect-timeout", connect_timeout),
        handover_timeout=options.seconds("--handover-timeout", handover_timeout),
    )
    warning = plain_tcp(parse(destination), "migrate")
    if warning:
        say.warn(warning)
    request = Request(source=source, destination=destination, policy=policy, stop=stop, log=log, json=json)
    outcome = run_loop(_migrate(request))
    if json:
        say.json_line(outcome)
    elif outcome.status == "completed":
        say.result(report(outcome))
    if outcome.status != "completed":
        say.note(f"amig: {outcome.error or 'the migration was cancelled; the guest runs on where it was'}")
    raise typer.Exit(outcome.exit_code)


async def _migrate(request: Request) -> Result:
    from amig.cli.event_log import event_log
    from amig.cli.loop import on_signals
    from amig.cli.progress import display
    from amig.session.migration import Migration

    migration = Migration(request.source, request.destination, request.policy, stop=request.stop)
    asked = False

    def cancel(_: signal.Signals) -> None:
        nonlocal asked
        if asked:
            say.note("amig: the cancellation is on its way")
        elif migration.cancel():
            asked = True
            say.note("amig: cancelling; the guest stays")
        else:
            say.note("amig: too late to cancel: the destination has the guest, and only its answer is awaited")

    title = f"{request.source} to {request.destination}"
    async with event_log(request.log) as write:
        with on_signals(cancel), display(title, quiet=request.json) as shown:
            await migration.__aenter__()
            try:
                async for event in migration:
                    shown.show(event)
                    if request.json:
                        say.json_line(event)
                    await write(event)
            except BaseException:
                migration.cancel()
                raise
            finally:
                result = await migration.result()
        await write(result)
    return result


def report(result: Result) -> str:
    """Return how a migration went, for people."""
    rate = format_rate(result.link_bytes_per_s)
    pages, window = result.pages, result.window_ms
    downtime = "none" if result.downtime_ms is None else format_duration(result.downtime_ms / 1e3)
    simulated = " (a simulated guest)" if result.engine == "simulator" else ""
    return "\n".join(
        (
            f"{result.source} -> {result.destination}{simulated}: {format_duration(result.total_ms / 1e3)}, "
            f"downtime {downtime}",
            f"  rounds    {result.rounds}",
            f"  pages     {pages.total}: {pages.sent} sent, {pages.zero} zero, {pages.resent} sent more than once",
            f"  bytes     {format_size(result.bytes.memory)} of memory, {format_size(result.bytes.wire)} on the wire "
            f"at {rate}, {result.streams} connection{'s' * (result.streams > 1)}, compression {result.compression}",
            f"  dirty log {result.dirty_log}, chunks of {format_size(result.chunk_bytes)}; clear to read "
            f"{window.p50:.3f} ms (p50), {window.p99:.3f} ms (p99), {window.max:.3f} ms (most)",
        )
    )
