"""``amig console``: a guest's serial port on this terminal."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from amig.cli import options, say
from amig.cli.app import command
from amig.errors import ControlError

if TYPE_CHECKING:
    from amig.cli.terminal import Keys
    from amig.control.operator import Console


@command(
    "amig console web1",
    "amig console web1 --no-replay < /dev/null     # only look on",
)
def console(
    name: options.GuestName,
    replay: Annotated[bool, typer.Option(help="Begin with what the guest wrote lately.")] = True,
) -> None:
    """Attach this terminal to a guest's serial port; Ctrl-] leaves it.

    Several terminals can be attached at once. When the guest moves to another host, this says where to, and ends:
    attach to it over there. Standard input may be a pipe or a file; its end does not end the console.
    """
    from amig.cli.loop import run

    raise typer.Exit(run(_console(name, replay)))


async def _console(name: str, replay: bool) -> int:
    from amig.cli import terminal
    from amig.cli.loop import on_signals
    from amig.host.attach import open_control

    leave = asyncio.Event()
    interrupted: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        interrupted.append(number)
        leave.set()

    async with await open_control(name, client="amig console") as control:
        shown = await control.console(replay=replay)
        if terminal.is_terminal():
            say.note(f"connected to {control.hello.name}; {terminal.ESCAPE_NAME} leaves")
        with terminal.raw_mode(), on_signals(stop):
            keys = terminal.Keys(escape=terminal.is_terminal())
            waiting = asyncio.create_task(leave.wait())
            showing = asyncio.create_task(_show(shown))
            feeding = asyncio.create_task(_feed(shown, keys, leave, ends=terminal.is_terminal()))
            try:
                await asyncio.wait({waiting, showing}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (waiting, showing, feeding):
                    task.cancel()
                await asyncio.wait({waiting, showing, feeding})
        if showing.cancelled():
            if terminal.is_terminal():
                say.note(f"\nleft {control.hello.name}, which goes on")
            return 128 + interrupted[0] if interrupted else 0
        showing.result()
        ended = shown.guest_ended
        if ended is None:
            raise ControlError(f"the host of {control.hello.name} has gone without a word: did it crash?")
        say.note(f"\n{control.hello.name}: {ended.reason or ended.state}")
        return 0


async def _show(shown: Console) -> None:
    """Write out what the guest writes, until its host goes."""
    dropped = 0
    while data := await shown.read():
        if shown.dropped > dropped:
            data = b"\r\n[amig: %d bytes dropped]\r\n" % (shown.dropped - dropped) + data
            dropped = shown.dropped
        await asyncio.to_thread(_write, data)


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


async def _feed(shown: Console, keys: Keys, leave: asyncio.Event, *, ends: bool) -> None:
    """Feed the guest with keys, until there are no more."""
    while data := await keys.read():
        try:
            await shown.write(data)
        except ControlError:  # the host is going: the reader tells
            return
    if ends:
        leave.set()
