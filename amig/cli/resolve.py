"""``amig resolve``: settles a handover that nobody has settled, by asking, or by an operator's word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from amig.cli import options, say
from amig.cli.app import command
from amig.errors import AmigError, HostError, NoSuchGuest, UsageError

if TYPE_CHECKING:
    from amig.control.operator import ControlClient
    from amig.guest import Handover, Outcome
    from amig.transport import LinkOptions


@command(
    "amig resolve web1                # ask the destination, and go by what it says",
    "amig resolve web1 --discard      # it runs over there: let go of this copy",
    "amig resolve web1 --run-here     # over there it never will: let it run here",
)
def resolve(
    name: options.GuestName,
    run_here: Annotated[
        bool, typer.Option("--run-here", help="The destination does not run the guest and never will.")
    ] = False,
    discard: Annotated[bool, typer.Option("--discard", help="The destination runs it: let go of it here.")] = False,
    insecure: options.Insecure = False,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    tls_ca: options.TlsCa = None,
) -> None:
    """Settle a handover in doubt: the destination was told to run the guest, and its answer was lost.

    Without an option the destination is asked, which has its answer on record. Where it can't be, look there first
    (amig status): if both sides ran the guest, its disks and its network peers would suffer. While its host still lives
    here, the guest goes on at once with --run-here. Where the host has gone, too, only its record is settled: the guest
    may then be started here again, from its beginning or from a snapshot. So it may with --run-here when it moved away
    for good and does not run there any more.
    """
    from amig.cli.loop import run
    from amig.guest import Outcome

    if run_here and discard:
        raise UsageError("say which side runs the guest: --run-here, or --discard when it runs over there")
    link = options.link(insecure=insecure, cert=tls_cert, key=tls_key, ca=tls_ca)
    word = Outcome.DISCARDED if run_here else Outcome.RUNNING if discard else None
    say.result(run(_resolve(name, word, link)))


async def _resolve(name: str, word: Outcome | None, link: LinkOptions) -> str:
    from amig.guest import Handover
    from amig.host.attach import open_control

    try:
        control = await open_control(name, client="amig resolve")
    except NoSuchGuest as error:
        return await _settle_record(name, word, link, error)
    async with control:
        doubt = (await control.status()).in_doubt
        if doubt is None:
            raise HostError(f"no handover of {name} is in doubt: amig status {name} tells how it is")
        handover = Handover(migration=doubt.migration, destination=doubt.destination, peer=doubt.peer)
        return await _release(control, name, handover, word, link)


async def _release(control: ControlClient, name: str, doubt: Handover, word: Outcome | None, link: LinkOptions) -> str:
    from amig.guest import Outcome
    from amig.session.asking import asked
    from amig.session.doubt import advice

    if word is not None:
        await control.release(doubt.migration, word)
    else:
        try:
            async with asked(doubt.destination, doubt.migration, link) as word:
                await control.release(doubt.migration, word)
        except (AmigError, OSError) as error:
            raise HostError(f"{name} stays in doubt: {error}. {advice(name, doubt)}") from error
    if word is Outcome.DISCARDED:
        return f"{name} runs on here"
    await control.gone()
    return f"{name} runs at {doubt.destination}; its host here has ended"


async def _settle_record(name: str, word: Outcome | None, link: LinkOptions, gone: NoSuchGuest) -> str:
    """Settle the record of a host that is gone."""
    from amig.host.handover import Records
    from amig.host.record import RecordState
    from amig.session.doubt import settle_record

    if "/" in name:
        raise gone
    record = Records().resolve(name, word) if word is not None else await settle_record(name, link)
    if record is None:
        raise HostError(f"no handover of guest {name} is in doubt")
    if record.state is RecordState.RELEASED:
        return f"noted: {name} runs at {record.destination}"
    return f"noted: {name} does not run at {record.destination}; its memory went with its host, amig run starts it anew"
