"""``amig pause``, ``resume``, ``cancel``, ``stop``: what an operator asks of a host."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from amig.cli import options, say
from amig.cli.app import command
from amig.errors import HostError

if TYPE_CHECKING:
    from amig.control.operator import ControlClient

_GONE_TIMEOUT = 60.0


def _do(name: str, what: str, act: Callable[[ControlClient], Awaitable[None]]) -> None:
    from amig.cli.loop import run
    from amig.host.attach import open_control

    async def main() -> None:
        async with await open_control(name, client=f"amig {what}") as control:
            await act(control)

    run(main())


@command(
    "amig pause web1",
)
def pause(name: options.GuestName) -> None:
    """Pause a guest until amig resume; it can be migrated meanwhile, and stays paused over there only by its source."""
    _do(name, "pause", lambda control: control.pause())
    say.result(f"{name} is paused; amig resume {name} lets it run")


@command(
    "amig resume web1",
)
def resume(name: options.GuestName) -> None:
    """Let a guest run that amig pause has paused."""
    _do(name, "resume", lambda control: control.resume())
    say.result(f"{name} runs, unless a migration is just moving it")


@command(
    "amig cancel web1",
)
def cancel(name: options.GuestName) -> None:
    """Cancel a guest's migration, whoever started it: the guest stays.

    Refused once the destination has been told to run it.
    """
    _do(name, "cancel", lambda control: control.cancel())
    say.result(f"{name}: its migration was asked to cancel; amig status {name} tells when it has")


@command(
    "amig stop web1",
    "amig stop web1 --force     # though nobody knows how its handover ended",
)
def stop(
    name: options.GuestName,
    force: Annotated[
        bool, typer.Option("--force", help="Also while a handover is in doubt; its record stays.")
    ] = False,
) -> None:
    """Stop a guest at once, like pulling its plug, and end its host."""

    async def act(control: ControlClient) -> None:
        await control.stop(force=force)
        try:
            async with asyncio.timeout(_GONE_TIMEOUT):
                await control.gone()
        except TimeoutError:
            raise HostError(f"{name} was stopped, but its host (process {control.hello.pid}) does not end") from None

    _do(name, "stop", act)
    say.result(f"{name} was stopped")


@command(
    "amig verify web1",
)
def verify(
    name: options.GuestName,
    timeout: Annotated[str, typer.Option("--timeout", metavar="TIME", help="How long to wait for it.")] = "10min",
    json: options.Json = False,
) -> None:
    """Ask a guest with amig's checking workload to verify all its memory.

    Ends with 0 when it is intact, with 45 when it is not.
    """
    from amig.cli.loop import run
    from amig.cli.verdict import ask_verdict, describe
    from amig.errors import VerifyFailed

    verdict = run(ask_verdict(name, options.seconds("--timeout", timeout)))
    if json:
        say.json_line(verdict)
    else:
        say.result(f"{name}: {describe(verdict)}")
    if not verdict.intact:
        raise typer.Exit(VerifyFailed.exit_code)
