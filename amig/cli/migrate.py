"""``amig migrate``: moves a guest, or writes it to a file."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amig.cli import options, say
from amig.cli.app import command
from amig.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from amig.cli.progress import Display
    from amig.events import Event, Result
    from amig.policy import Policy
    from amig.transport import LinkOptions

_LIMITS = "Limits"
_STREAM = "Stream"
_VERIFIED = {
    "digests": "digests of all pages as sent and as placed",
    "full": "all memory of both sides, and digests of all pages as sent and as placed",
    "none": "nothing was compared",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be moved."""

    source: str
    destination: str
    policy: Policy
    link: LinkOptions
    stop: bool
    log: Path | None
    json: bool


@command(
    "amig migrate web1 ssh://hostb/web1 --downtime 50ms --bandwidth 500MB/s",
    "amig migrate web1 -                  # asks for the address that amig receive --pair shows on the other side",
    "amig migrate web1 tls://hostb:7000 --streams 2 --compression zstd --timeout 5min --on-timeout switch",
    "amig migrate web1 file:/backup/web1.snapshot",
    "amig migrate file:/backup/web1.snapshot ssh://hostb/web1",
)
def migrate(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A guest's name, the path of its control socket, or file:PATH.")
    ],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DST",
            help="ssh://[USER@]HOST/NAME, tls://HOST:PORT, tcp://HOST:PORT, unix:PATH, file:PATH; - reads it from "
            "standard input.",
        ),
    ],
    bandwidth: Annotated[
        str, typer.Option("--bandwidth", metavar="RATE", help="Most bytes a second.", rich_help_panel=_LIMITS)
    ] = "unlimited",
    downtime: Annotated[
        str, typer.Option("--downtime", metavar="TIME", help="How long it may stand still.", rich_help_panel=_LIMITS)
    ] = "100ms",
    max_rounds: Annotated[
        int, typer.Option("--max-rounds", help="Rounds before --on-timeout applies.", rich_help_panel=_LIMITS)
    ] = 1000,
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
    reconnect: Annotated[
        str,
        typer.Option(
            "--reconnect",
            metavar="TIME",
            help="When the connection is lost before the other side has everything, seek that for so long, and go on "
            "with what it has: only the rest is sent. The guest runs meanwhile. 0: a lost connection is the end.",
            rich_help_panel=options.LINK,
        ),
    ] = "30s",
    keepalive: options.KeepAlive = "5s",
    stall: options.Stall = "20s",
    compression: Annotated[
        options.Compression, typer.Option("--compression", help="Of pages.", rich_help_panel=_STREAM)
    ] = options.Compression.NONE,
    level: Annotated[int, typer.Option("--level", help="Of zstd, 1 to 19.", rich_help_panel=_STREAM)] = 1,
    delta_cache: Annotated[
        str,
        typer.Option(
            "--delta-cache",
            metavar="SIZE",
            help="Memory for pages as they were sent: a page that is sent again travels as what has changed in it. For "
            "links that can't follow a busy guest; with as much as the guest has, it works from the second round on. "
            "Where it gets nowhere, pages travel as wholes.",
            rich_help_panel=_STREAM,
        ),
    ] = "0",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            help="Threads that compress; without it, what the processors here allow, up to 4.",
            rich_help_panel=_STREAM,
        ),
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(
            "--streams",
            help="Connections that carry memory; without it, as many as there are processors here, up to 4, and one "
            "where more carry no more (tls, ssh, files).",
            rich_help_panel=_STREAM,
        ),
    ] = None,
    chunk: Annotated[
        str,
        typer.Option("--chunk", metavar="SIZE", help="Dirty bytes cleared and read at once.", rich_help_panel=_STREAM),
    ] = "4MiB",
    chunk_span: Annotated[
        str | None,
        typer.Option("--chunk-span", metavar="SIZE", help="Most address range of a chunk.", rich_help_panel=_STREAM),
    ] = None,
    dirty_log: Annotated[
        str | None,
        typer.Option(
            "--dirty-log",
            metavar="STRATEGY",
            help="exact, slot-cache or auto-clear, or ring for a guest that was started or received with "
            "--dirty-ring; else the best that its host offers.",
            rich_help_panel=_STREAM,
        ),
    ] = None,
    lose_pages: Annotated[
        bool,
        typer.Option(
            "--this-may-destroy-the-guest",
            help="Allow --dirty-log blind and migration-bitmap, which are known to lose pages: the guest's memory is "
            "damaged where it arrives. To see that for yourself.",
            rich_help_panel=_STREAM,
        ),
    ] = False,
    verify: Annotated[
        options.Verify,
        typer.Option(
            "--verify",
            help="digests: of every page as sent and as placed, equal before the guest may run there. full: all memory "
            "of both sides is hashed as well while the guest is paused, whatever --downtime says, and pages that "
            "differ are named. off: for measurements.",
            rich_help_panel=_STREAM,
        ),
    ] = options.Verify.DIGESTS,
    insecure: options.Insecure = False,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    tls_ca: options.TlsCa = None,
    stop: Annotated[bool, typer.Option("--stop", help="With a file: the guest doesn't run on.")] = False,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Append all events to a file, as JSON lines.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Move a running guest to another host, or write it to a file.

    DST is where amig receive listens; with ssh:// it is started there. The guest runs on here while its memory is sent,
    again and again what it wrote meanwhile, until the rest fits the downtime; then it is paused, and goes on over
    there. Whatever fails before the other side has everything, it runs on here. Ctrl-C, or amig cancel NAME, keeps it
    here. A connection that is lost on the way is made anew (--reconnect), except for ssh:// and files.

    A migration to a file is a live snapshot: the guest runs on (with --stop it doesn't), and the file appears when it
    is whole. A file can be SRC, too.

    An address of amig receive --pair has a secret in it, and every user of this machine can read command lines: write -
    as DST, and paste it when asked, or send it through a pipe. What ssh is run as is in AMIG_SSH (ssh -i KEY), where
    amig is found on the other side in AMIG_REMOTE_PATH.
    """
    from amig.cli.caution import plain_tcp
    from amig.cli.loop import run as run_loop
    from amig.cli.secret import read_destination
    from amig.policy import Policy

    policy = Policy(
        bandwidth=options.rate("--bandwidth", bandwidth),
        downtime=options.seconds("--downtime", downtime),
        max_rounds=max_rounds,
        timeout=None if timeout is None else options.seconds("--timeout", timeout),
        on_timeout=on_timeout.value,
        chunk=options.size("--chunk", chunk),
        chunk_span=None if chunk_span is None else options.size("--chunk-span", chunk_span),
        dirty_log=dirty_log,
        may_lose_pages=lose_pages,
        compression=compression.value,
        level=level,
        delta_cache=options.size("--delta-cache", delta_cache),
        workers=workers,
        streams=streams,
        verify=verify.value,
        connect_timeout=options.seconds("--connect-timeout", connect_timeout),
        handover_timeout=options.seconds("--handover-timeout", handover_timeout),
        reconnect=options.seconds("--reconnect", reconnect),
        keepalive=options.seconds("--keepalive", keepalive),
        stall=options.seconds("--stall", stall),
    )
    link = options.link(insecure=insecure, cert=tls_cert, key=tls_key, ca=tls_ca)
    destination = read_destination(destination)
    warning = plain_tcp(destination, link, listening=False)
    if warning:
        say.warn(warning)
    request = Request(source=source, destination=destination, policy=policy, link=link, stop=stop, log=log, json=json)
    outcome = run_loop(_migrate(request))
    if json:
        say.json_line(outcome)
    elif outcome.status == "completed":
        say.result(report(outcome))
    if outcome.status != "completed":
        say.note(f"amig: {outcome.error or 'the migration was cancelled; the guest runs on where it was'}")
    raise typer.Exit(outcome.exit_code)


async def _migrate(request: Request) -> Result:
    from amig.aio import finish
    from amig.cli.event_log import event_log
    from amig.cli.loop import on_signals
    from amig.cli.progress import display
    from amig.session.endpoints import shown as without_secret
    from amig.session.migration import Migration

    migration = Migration(request.source, request.destination, request.policy, stop=request.stop, link=request.link)
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

    title = f"{request.source} to {without_secret(request.destination)}"
    # A thread of its own: a terminal that was stopped, or a reader that does not read, must not stop the migration,
    # least of all while the guest is paused. What piles up meanwhile is bounded by the migration's queue of events.
    with ThreadPoolExecutor(1, "amig-voice") as voice:
        loop = asyncio.get_running_loop()
        async with event_log(request.log) as write:
            with on_signals(cancel), display(title, quiet=request.json) as shown:
                await migration.__aenter__()
                try:
                    async for event in migration:
                        await finish(loop.run_in_executor(voice, _tell, shown, event, request.json))
                        await write(event)
                except BaseException:
                    migration.cancel()
                    raise
                finally:
                    result = await migration.result()
            await write(result)
    return result


def _tell(shown: Display, event: Event, json: bool) -> None:
    shown.show(event)
    if json:
        say.json_line(event)


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
            f"  rounds    {result.rounds}"
            + (
                f", connected again {result.reconnects} time{'s' * (result.reconnects > 1)}"
                if result.reconnects
                else ""
            ),
            f"  pages     {pages.total}: {pages.sent} sent, {pages.zero} zero, {pages.resent} sent more than once"
            + (f", {pages.delta} as differences" if pages.delta else ""),
            f"  bytes     {format_size(result.bytes.memory)} of memory, {format_size(result.bytes.wire)} on the wire "
            f"at {rate}, {result.streams} connection{'s' * (result.streams > 1)}, compression {result.compression}",
            f"  verified  {_VERIFIED[result.verified]}",
            f"  dirty log {result.dirty_log}, chunks of {format_size(result.chunk_bytes)}; clear to read "
            f"{window.p50:.3f} ms (p50), {window.p99:.3f} ms (p99), {window.max:.3f} ms (most)",
        )
    )
