"""``amig receive``: waits for a guest and hosts it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from amig.cli import options, say
from amig.cli.app import command
from amig.errors import HostError, UsageError
from amig.units import format_duration

if TYPE_CHECKING:
    from amig.cli.hosting import Host
    from amig.errors import AmigError
    from amig.session.inbound import Phase
    from amig.session.reception import Reception
    from amig.transport import LinkOptions

_TEXTS = {
    "memory": "a guest is arriving",
    "lost": "the connection is lost; what came is kept for a source that connects again",
    "loading": "its memory is here; loading its state",
    "prepared": "ready to run it; waiting for the source to let go",
    "discarded": "what came was thrown away",
}


_MEMORY = "Memory"
PAIR_AT = "tls://0.0.0.0:7000"
STDIO_TIMEOUT = 1e6
"""Seconds: the command that ssh runs ends when the guest is here, however long that takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is waited for, and how."""

    address: str | None
    """None: standard input and output."""
    link: LinkOptions
    pair_for: float | None
    """Seconds that a pairing address is good for; None: no pairing."""
    once: bool
    hugepages: bool
    workers: int
    memory: int
    max_memory: int
    dirty_ring: int
    keep: float
    keepalive: float
    stall: float
    detached: bool


@command(
    "amig receive --pair --name web1 --serial file:web1.log         # shows an address for amig migrate NAME -",
    "amig receive tls://0.0.0.0:7000 --name web1",
    "amig receive tcp://127.0.0.1:0 --name web1 --once --json      # the first line tells the port",
    "amig receive unix:/run/move.sock --name web1 --detach",
    "amig receive --pair --name web1 --memory 4GiB                 # with memory made ready for it",
)
def receive(
    address: Annotated[
        str | None,
        typer.Argument(
            metavar="[ADDRESS]",
            help="tls://HOST:PORT, tcp://HOST:PORT or unix:PATH; with port 0 the kernel chooses one. With --pair "
            f"{PAIR_AT} where it is left out.",
        ),
    ] = None,
    *,
    name: Annotated[str, typer.Option("--name", help="What the guest is called on this machine.")],
    serial: options.Serial = "none",
    once: Annotated[bool, typer.Option("--once", help="End when an attempt fails, instead of waiting on.")] = False,
    pair: Annotated[
        bool, typer.Option("--pair", help="Encrypt with a secret for one use: no certificates are needed.")
    ] = False,
    pair_for: Annotated[
        str, typer.Option("--pair-for", metavar="TIME", help="How long the address of --pair is good.")
    ] = "10min",
    stdio: Annotated[
        bool, typer.Option("--stdio", help="The far side of ssh://: standard input and output are the connection.")
    ] = False,
    answer: Annotated[
        bool, typer.Option("--answer", hidden=True, help="With --stdio: only answer a question.")
    ] = False,
    insecure: options.Insecure = False,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    tls_ca: options.TlsCa = None,
    hugepages: options.HugePages = False,
    workers: Annotated[int, typer.Option("--workers", min=1, max=64, help="Threads that decompress.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Make so much memory ready before listening: a guest of up to that size arrives faster.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory", metavar="SIZE", help="Refuse guests with more than that.", rich_help_panel=_MEMORY
        ),
    ] = None,
    dirty_ring: options.DirtyRing = None,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            metavar="TIME",
            help="Keep what has come when the connection is lost, for a source that connects again; others have to "
            "wait. Longer than its --reconnect. 0: a lost connection is the end.",
            rich_help_panel=options.LINK,
        ),
    ] = "60s",
    keepalive: options.KeepAlive = "5s",
    stall: options.Stall = "20s",
    detach: options.Detach = False,
    json: options.Json = False,
    lifeline: options.Lifeline = False,
) -> None:
    """Wait for a guest to arrive, and host it until it ends or moves on.

    The other side is amig migrate. What needs nothing to be set up is --pair, or amig migrate NAME ssh://HOST/NAME on
    the other side, which starts this command here by itself. With tls:// both sides show certificates. The stream over
    tcp:// is not encrypted: outside this machine it needs --insecure.

    The address that --pair shows has a secret in it, good for one source and one attempt. Don't keep it.

    A guest needs as much memory here as it uses there, or it is refused; --memory takes it ahead, all of it for good. A
    guest that is larger than that gets its memory as without the option, and what was made ready is given back.
    """
    from amig.cli.caution import plain_tcp
    from amig.cli.hosting import Host, is_detached, serial_choice
    from amig.cli.hosting import detach as start
    from amig.cli.loop import run as run_loop
    from amig.transport import stdio as ssh_side
    from amig.transport.address import parse_socket

    where = _where(address, pair=pair, stdio=stdio)
    if answer:
        if not stdio:
            raise UsageError("--answer goes with --stdio")
        run_loop(_only_answer(ssh_side.take_over()))
        return
    link = options.link(insecure=insecure, cert=tls_cert, key=tls_key, ca=tls_ca)
    patience = options.seconds("--pair-for", pair_for)
    warning = ""
    if where is not None:
        parse_socket(where)
        warning = plain_tcp(where, link, listening=True)
    elif json or lifeline or serial == "stdio":
        raise UsageError("--stdio needs standard input and output for itself: leave --json and --serial stdio out")
    choice = serial_choice(serial, json=json, detach=detach, lifeline=lifeline)
    request = Request(
        address=where,
        link=link,
        pair_for=patience if pair else None,
        once=once or pair or stdio,
        hugepages=hugepages,
        workers=workers,
        memory=options.size("--memory", memory) if memory is not None else 0,
        max_memory=options.size("--max-memory", max_memory) if max_memory is not None else 0,
        dirty_ring=options.ring_bytes(dirty_ring) if dirty_ring is not None else 0,
        keep=options.seconds("--keep", keep),
        keepalive=options.seconds("--keepalive", keepalive),
        stall=options.seconds("--stall", stall),
        detached=is_detached(),
    )
    if warning and not is_detached():
        say.warn(warning)
    if detach and not is_detached():
        if stdio:
            start(name, timeout=STDIO_TIMEOUT, stdio=ssh_side.take_over())
            return
        ready = start(name)
        if json:
            invitation = {"invitation": ready.info["invitation"]} if pair else {}
            say.json_line({"listening": ready.info["listening"], **invitation, "name": name, "pid": ready.pid})
        else:
            say.result(ready.info["text"])
        return
    logging.getLogger("amig.session.reception").setLevel(logging.ERROR)  # we tell of failed attempts ourselves
    host = Host(name, choice, json=json, lifeline=lifeline, link=link)
    raise typer.Exit(run_loop(_receive(host, request)))


async def _only_answer(ends: tuple[int, int]) -> None:
    """Say what became of a migration to here, whether or not its host lives."""
    from amig.host.handover import Records
    from amig.session.questions import HostRecords, answer_only
    from amig.transport.stdio import StdioListener

    listener = StdioListener(*ends)
    try:
        await answer_only(await listener.accept(), HostRecords(Records()))
    finally:
        await listener.close()


def _where(address: str | None, *, pair: bool, stdio: bool) -> str | None:
    if stdio:
        if address is not None or pair:
            raise UsageError("--stdio is the connection: leave ADDRESS and --pair out")
        return None
    if address is None and not pair:
        raise UsageError(f"where shall it listen? Write --pair, tls://HOST:PORT, or unix:PATH ({PAIR_AT} is usual)")
    where = address or PAIR_AT
    if pair and not where.lower().startswith("tls:"):
        raise UsageError(f"--pair listens on tls://HOST:PORT, {PAIR_AT} where it is left out")
    return where


async def _receive(host: Host, request: Request) -> int:
    from amig.host.kvm_probe import check_dirty_ring
    from amig.session.reception import Reception
    from amig.transport import stdio
    from amig.transport.pairing import PairingHost

    def on_phase(phase: Phase) -> None:
        word = str(phase)
        if word in _TEXTS:
            host.say(f"{host.name}: {_TEXTS[word]}", {"event": "phase", "phase": word})

    def on_failure(error: AmigError) -> None:
        if not request.once:
            text = f"{host.name}: the attempt failed, waiting for the next one: {error}"
            host.say(text, {"event": "failed", "error": str(error), "exit_code": error.exit_code})

    def on_note(text: str) -> None:
        host.say(f"{host.name}: {text}", {"event": "notice", "text": text})

    async def body() -> int:
        await host.ask_first()
        if request.dirty_ring:
            check_dirty_ring(request.dirty_ring)
        pairing = None if request.pair_for is None else PairingHost(lasts=request.pair_for)
        where = request.address or stdio.StdioListener(*(stdio.inherited() or stdio.take_over()))
        reception = Reception(
            where,
            name=host.name,
            sinks=host.sinks,
            once=request.once,
            link=request.link,
            pairing=pairing,
            hugepages=request.hugepages,
            workers=request.workers,
            memory=request.memory,
            max_memory=request.max_memory,
            dirty_ring=request.dirty_ring,
            keep=request.keep,
            keepalive=request.keepalive,
            stall=request.stall,
            on_phase=on_phase,
            on_failure=on_failure,
            on_note=on_note,
        )
        async with reception, host.keys(reception.service):
            if request.address is not None:
                _announce(host, reception, request)
            try:
                await reception.arrived()
            except HostError:
                if not reception.service.hosted.ended.done():
                    raise
                return host.last_word(await reception.service.ended())  # an operator has stopped it
            host.is_up()
            machine = reception.service.hosted.machine
            value = {"event": "running", "name": host.name, "engine": machine.engine}
            host.say(f"{host.name}: the guest runs here now", value | {"socket": str(reception.service.socket_path)})
            ended = await host.until_end(reception.service)
        return host.last_word(ended)

    return await host.run(body)


def _announce(host: Host, reception: Reception, request: Request) -> None:
    here, invitation = reception.address, reception.invitation
    if request.pair_for is None:
        text = f"{host.name}: listening on {here}\n  amig migrate NAME {here} on the other side moves a guest here"
        host.say(text, {"listening": here})
        host.is_up(listening=here, text=text)
        return
    text = (
        f"{host.name}: listening on {here} for {format_duration(request.pair_for)}, for one source\n"
        f"  amig migrate NAME - on the other side asks for this address, which has a secret in it and is good once:\n"
        f"{invitation}"
    )
    if not request.detached:  # the output of a detached host is a log, and the secret must not be in it
        host.say(text, {"listening": here, "invitation": invitation})
    host.is_up(listening=here, invitation=invitation, text=text)
