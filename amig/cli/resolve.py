"""``amig resolve``: an operator's word on a handover that nobody has settled."""

from __future__ import annotations

from typing import Annotated

import typer

from amig.cli import options, say
from amig.cli.app import command
from amig.errors import HostError, NoSuchGuest, UsageError


@command(
    "amig resolve web1 --discard      # it runs over there: let go of this copy",
    "amig resolve web1 --run-here     # over there it never will: let it run here",
)
def resolve(
    name: options.GuestName,
    run_here: Annotated[
        bool, typer.Option("--run-here", help="The destination does not run the guest and never will.")
    ] = False,
    discard: Annotated[bool, typer.Option("--discard", help="The destination runs it: let go of it here.")] = False,
) -> None:
    """Settle a handover in doubt: the destination was told to run the guest, and its answer was lost.

    Look at the destination first (amig status): if both sides ran the guest, its disks and its network peers would
    suffer. While its host still lives here, the guest goes on at once with --run-here. Where the host has gone, too,
    only its record is settled: the guest may then be started here again, from its beginning or from a snapshot.
    """
    from amig.cli.loop import run

    if run_here == discard:
        raise UsageError("say which side runs the guest: --run-here, or --discard when it runs over there")
    say.result(run(_resolve(name, run_here=run_here)))


async def _resolve(name: str, *, run_here: bool) -> str:
    from amig.guest import Outcome
    from amig.host.attach import open_control

    outcome = Outcome.DISCARDED if run_here else Outcome.RUNNING
    try:
        control = await open_control(name, client="amig resolve")
    except NoSuchGuest as error:
        return _settle_record(name, outcome, error)
    async with control:
        doubt = (await control.status()).in_doubt
        if doubt is None:
            raise HostError(f"no handover of {name} is in doubt: amig status {name} tells how it is")
        await control.release(doubt.migration, outcome)
        if run_here:
            return f"{name} runs on here"
        await control.gone()
        return f"{name} runs at {doubt.destination}; its host here has ended"


def _settle_record(name: str, outcome: object, gone: NoSuchGuest) -> str:
    """Settle the record of a host that is gone."""
    from amig.guest import Outcome
    from amig.host.handover import Records

    if "/" in name:
        raise gone
    assert isinstance(outcome, Outcome)  # noqa: S101 - as the caller has it
    record = Records().resolve(name, outcome)
    if outcome is Outcome.RUNNING:
        return f"noted: {name} runs at {record.destination}"
    return f"noted: {name} does not run at {record.destination}; its memory went with its host, amig run starts it anew"
