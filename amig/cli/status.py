"""``amig status`` and ``amig list``: how guests are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amig.cli import options, say
from amig.cli.app import command
from amig.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from amig.control.replies import MigrationStatus, StatusIs

_ENGINES = {"kvm": "KVM", "simulator": "the simulator", "": "nothing yet"}


@command(
    "amig status web1",
    "amig status web1 --json",
)
def status(name: options.GuestName, json: options.Json = False) -> None:
    """Show how a guest and its host are."""
    from amig.cli.loop import run

    found = run(ask(name))
    if json:
        say.json_line(found)
    else:
        say.result("\n".join(describe(found)))


async def ask(name: str) -> StatusIs:
    """Return the status of the host of that name."""
    from amig.host.attach import open_control

    async with await open_control(name, client="amig status") as control:
        return await control.status()


def describe(found: StatusIs) -> list[str]:
    """Return the lines of a status, for people."""
    paused = " by an operator" if found.operator_paused else ""
    lines = [f"{found.name}: {found.state}{paused} on {_ENGINES.get(found.engine, found.engine)}"]
    if found.reason:
        lines.append(f"  reason     {found.reason}")
    if found.vcpus:
        lines.append(f"  machine    {format_size(found.memory_bytes)}, {found.vcpus} vCPU{'s' * (found.vcpus > 1)}")
    consoles = f", {found.consoles} console{'s' * (found.consoles > 1)} attached" if found.consoles else ""
    lines.append(f"  host       process {found.pid}, up {format_duration(found.uptime_s)}{consoles}")
    if found.log_strategy:
        lines.append(f"  dirty log  {found.log_strategy}, for {', '.join(found.log_users)}")
    if found.migration is not None:
        lines += _migration("migrating to", found.migration)
    elif found.last_migration is not None:
        lines += _migration("last to", found.last_migration)
    if found.in_doubt is not None:
        lines += [
            f"  IN DOUBT   handed over to {found.in_doubt.destination} ({found.in_doubt.peer}), end unknown",
            f"             it runs there: amig resolve {found.name} --discard",
            f"             it never will: amig resolve {found.name} --run-here",
        ]
    if found.guest is not None:
        guest = found.guest
        lines.append(f"  workload   {guest.workload}, {guest.state}: {guest.writes} pages written")
        if guest.workload == "check":
            wrong = f"{guest.mismatches} MISMATCHES" if guest.mismatches else "no mismatch"
            lines.append(f"             {guest.verified} pages verified in {guest.passes} full passes, {wrong}")
    return lines


def _migration(how: str, found: MigrationStatus) -> list[str]:
    lines = [f"  {how:10} {found.destination}: {found.status}, {format_duration(found.seconds)}"]
    if found.error:
        lines.append(f"             {found.error}")
    progress = found.progress
    if found.status == "running" and progress.state:
        lines.append(
            f"             {progress.state}, round {progress.round}, {progress.fraction:.0%}, "
            f"{format_rate(progress.bytes_per_s)}; waits for {progress.waiting_for}"
        )
    return lines


@command(
    "amig list",
    "amig list --json",
    name="list",
)
def list_(json: options.Json = False) -> None:
    """Show all guests of this user on this machine.

    Handovers in doubt whose host is gone are shown, too.
    """
    from amig.cli.loop import run

    found, unsettled = run(_ask_all())
    if json:
        for one in found:
            say.json_line(one)
        for name, destination in unsettled:
            say.json_line({"name": name, "state": "gone", "in_doubt": {"destination": destination}})
        return
    if not found and not unsettled:
        say.note("no guest is hosted here; amig run and amig receive host one")
        return
    rows = [("NAME", "STATE", "ENGINE", "MEMORY", "VCPUS", "PID", "")]
    for one in found:
        what = f"migrating to {one.migration.destination}" if one.migration is not None else ""
        if one.in_doubt is not None:
            what = f"handed over to {one.in_doubt.destination}, IN DOUBT: amig status {one.name}"
        size = format_size(one.memory_bytes) if one.memory_bytes else "-"
        rows.append((one.name, str(one.state), one.engine or "-", size, str(one.vcpus or "-"), str(one.pid), what))
    for name, destination in unsettled:
        rows.append((name, "gone", "-", "-", "-", "-", f"handed over to {destination}, IN DOUBT: amig resolve {name}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        say.result("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


async def _ask_all() -> tuple[list[StatusIs], list[tuple[str, str]]]:
    from amig.cli.unsettled import unsettled
    from amig.errors import HostError
    from amig.host.names import live_hosts

    found = []
    for name, path in live_hosts():
        try:
            found.append(await ask(str(path)))
        except HostError as error:  # gone meanwhile, or it does not answer
            say.warn(f"{name}: {error}")
    alive = {one.name for one in found}
    return found, [pair for pair in unsettled() if pair[0] not in alive]
