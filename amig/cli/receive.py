"""``amig receive``: waits for a guest and hosts it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from amig.cli import options, say
from amig.cli.app import command

if TYPE_CHECKING:
    from amig.cli.hosting import Host
    from amig.errors import AmigError
    from amig.session.inbound import Phase

_TEXTS = {
    "memory": "a guest is arriving",
    "loading": "its memory is here; loading its state",
    "prepared": "ready to run it; waiting for the source to let go",
    "discarded": "what came was thrown away",
}


@command(
    "amig receive tcp://10.0.0.2:7000 --name web1 --serial file:web1.log",
    "amig receive tcp://127.0.0.1:0 --name web1 --once --json      # the first line tells the port",
    "amig receive unix:/run/move.sock --name web1 --detach",
)
def receive(
    address: Annotated[
        str,
        typer.Argument(metavar="ADDRESS", help="tcp://HOST:PORT or unix:PATH; with port 0 the kernel chooses one."),
    ],
    name: Annotated[str, typer.Option("--name", help="What the guest is called on this machine.")],
    serial: options.Serial = "none",
    once: Annotated[bool, typer.Option("--once", help="End when an attempt fails, instead of waiting on.")] = False,
    hugepages: options.HugePages = False,
    workers: Annotated[int, typer.Option("--workers", min=1, max=64, help="Threads that decompress.")] = 1,
    detach: options.Detach = False,
    json: options.Json = False,
    lifeline: options.Lifeline = False,
) -> None:
    """Wait for a guest to arrive, and host it until it ends or moves on.

    The other side is amig migrate. The stream over tcp is not encrypted: use it on a network that you trust, or through
    a tunnel.
    """
    from amig.cli.caution import plain_tcp
    from amig.cli.hosting import Host, is_detached, serial_choice
    from amig.cli.hosting import detach as start
    from amig.cli.loop import run as run_loop
    from amig.transport.address import parse_socket

    warning = plain_tcp(parse_socket(address), "receive")
    choice = serial_choice(serial, json=json, detach=detach, lifeline=lifeline)
    if warning and not is_detached():
        say.warn(warning)
    if detach and not is_detached():
        ready = start(name)
        if json:
            say.json_line({"listening": ready.info["listening"], "name": name, "pid": ready.pid})
        else:
            say.result(ready.info["text"])
        return
    logging.getLogger("amig.session.reception").setLevel(logging.ERROR)  # we tell of failed attempts ourselves
    host = Host(name, choice, json=json, lifeline=lifeline)
    raise typer.Exit(run_loop(_receive(host, address, once=once, hugepages=hugepages, workers=workers)))


async def _receive(host: Host, address: str, *, once: bool, hugepages: bool, workers: int) -> int:
    from amig.session.reception import Reception

    def on_phase(phase: Phase) -> None:
        word = str(phase)
        if word in _TEXTS:
            host.say(f"{host.name}: {_TEXTS[word]}", {"event": "phase", "phase": word})

    def on_failure(error: AmigError) -> None:
        if not once:
            text = f"{host.name}: the attempt failed, waiting for the next one: {error}"
            host.say(text, {"event": "failed", "error": str(error), "exit_code": error.exit_code})

    async def body() -> int:
        reception = Reception(
            address,
            name=host.name,
            sinks=host.sinks,
            once=once,
            hugepages=hugepages,
            workers=workers,
            on_phase=on_phase,
            on_failure=on_failure,
        )
        async with reception, host.keys(reception.service):
            here = reception.address
            text = f"{host.name}: listening on {here}\n  amig migrate NAME {here} on the other side moves a guest here"
            host.say(text, {"listening": here})
            host.is_up(listening=here, text=text)
            await reception.arrived()
            machine = reception.service.hosted.machine
            value = {"event": "running", "name": host.name, "engine": machine.engine}
            host.say(f"{host.name}: the guest runs here now", value | {"socket": str(reception.service.socket_path)})
            ended = await host.until_end(reception.service)
        return host.last_word(ended)

    return await host.run(body)
