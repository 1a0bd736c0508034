"""``amig demo``: a guest that checks its own memory moves between two processes of this machine."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from amig.cli import options, say
from amig.cli.app import command


class Engine(StrEnum):
    """``--engine``; auto is KVM, or the simulator where KVM can't be used."""

    AUTO = "auto"
    KVM = "kvm"
    SIMULATOR = "simulator"


@command(
    "amig demo",
    "amig demo --memory 2GiB --working-set 1GiB --rate 400MB/s --streams 2 --compression zstd",
    "amig demo --lose-a-page     # and the guest notices: ends with 45",
)
def demo(
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="Guest memory.")] = "512MiB",
    working_set: Annotated[
        str, typer.Option("--working-set", metavar="SIZE", help="What the guest writes and checks.")
    ] = "256MiB",
    rate: Annotated[str, typer.Option("--rate", metavar="RATE", help="How fast the guest writes.")] = "200MB/s",
    vcpus: Annotated[int, typer.Option("--vcpus", min=1, max=64, help="Virtual processors.")] = 1,
    bandwidth: Annotated[
        str, typer.Option("--bandwidth", metavar="RATE", help="Most bytes a second; the default is a 10 Gbit/s link.")
    ] = "1250MB/s",
    downtime: Annotated[
        str, typer.Option("--downtime", metavar="TIME", help="How long the guest may stand still.")
    ] = "50ms",
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="TIME", help="When to move it with whatever downtime that takes.")
    ] = "30s",
    streams: Annotated[
        int | None,
        typer.Option("--streams", help="Connections that carry memory; without it, one a processor, up to 4."),
    ] = None,
    compression: Annotated[
        options.Compression, typer.Option("--compression", help="Of pages.")
    ] = options.Compression.NONE,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Threads that compress; without it, what the processors allow.")
    ] = None,
    chunk: Annotated[
        str, typer.Option("--chunk", metavar="SIZE", help="Dirty bytes cleared and read at once.")
    ] = "4MiB",
    dirty_log: Annotated[
        str | None,
        typer.Option("--dirty-log", metavar="STRATEGY", help="exact, slot-cache or auto-clear; else the best."),
    ] = None,
    engine: Annotated[Engine, typer.Option("--engine", help="auto: KVM, or else the simulator.")] = Engine.AUTO,
    lose_a_page: Annotated[
        bool, typer.Option("--lose-a-page", help="Never send one page, to see that the guest notices.")
    ] = False,
    json: options.Json = False,
) -> None:
    """See a guest move, live and unharmed.

    Starts two guest hosts in processes of their own and one guest, which writes random pages of its working set and
    checks them all the time; moves it over loopback TCP; lets it run on, has it verify its whole working set, and tells
    how it went. Ends with 0 only if the guest finds its memory intact.

    Where KVM can't be used it runs on the simulator, and says so in every line of the result.
    """
    from amig.cli.demo_run import Request, run_demo
    from amig.cli.loop import run
    from amig.policy import Policy

    request = Request(
        memory=options.size("--memory", memory),
        working_set=options.size("--working-set", working_set),
        rate=options.rate("--rate", rate) or 0,
        vcpus=vcpus,
        policy=Policy(
            bandwidth=options.rate("--bandwidth", bandwidth),
            downtime=options.seconds("--downtime", downtime),
            timeout=options.seconds("--timeout", timeout),
            on_timeout="switch",
            streams=streams,
            compression=compression.value,
            workers=workers,
            chunk=options.size("--chunk", chunk),
            dirty_log=dirty_log,
        ),
        simulated=_choose(engine, json),
        lose_a_page=lose_a_page,
        json=json,
    )
    raise typer.Exit(run(run_demo(request)))


def _choose(engine: Engine, json: bool) -> bool:
    """Return whether to simulate; raises `KvmUnavailable` when KVM was asked for by name and can't be used."""
    from amig.errors import KvmUnavailable
    from amig.kvm.system import Kvm

    if engine is Engine.SIMULATOR:
        return True
    try:
        Kvm.open().close()
    except KvmUnavailable as error:
        if engine is Engine.KVM:
            raise
        say.note(f"KVM can't be used here: {error}")
        say.note("so this is a SIMULATION: a simulated guest, moved by the real pipeline; it says nothing about KVM")
        return True
    return False
