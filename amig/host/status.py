"""What `amig status` shows, gathered."""

from __future__ import annotations

import logging
import os
import time

from amig.control import messages as m
from amig.dirty.hub import LogUserStatus
from amig.host.hosted import HostedGuest, Migration

_log = logging.getLogger(__name__)


async def status(hosted: HostedGuest, *, request: int, consoles: int) -> m.StatusIs:
    """Return everything there is to know of a host."""
    users: tuple[LogUserStatus, ...] = ()
    progress: m.GuestProgress | None = None
    strategy = ""
    if hosted.has_machine:
        hub = hosted.hub
        strategy = hub.strategy or ""
        users = await hosted.vm.call(lambda: hub.users)
        progress = await hosted.vm.call(_progress, hosted)
    machine = hosted.machine if hosted.has_machine else None
    doubt = hosted.in_doubt
    return m.StatusIs(
        id=request,
        name=hosted.name,
        pid=os.getpid(),
        engine=machine.engine if machine else "",
        state=hosted.state,
        reason=hosted.reason[:4096],
        operator_paused=hosted.operator_paused,
        vcpus=machine.vcpus if machine else 0,
        memory_bytes=machine.memory.map.size if machine else 0,
        uptime_s=time.monotonic() - hosted.started_at,
        log_strategy=strategy,
        log_users=tuple(user.name for user in users),
        consoles=consoles,
        migration=_migration(hosted.migration),
        last_migration=_migration(hosted.last_migration),
        in_doubt=None
        if doubt is None
        else m.HandoverStatus(migration=doubt.migration, destination=doubt.destination, peer=doubt.peer),
        guest=progress,
    )


def _progress(hosted: HostedGuest) -> m.GuestProgress | None:
    if hosted.read_progress is None or not hosted.has_machine:
        return None
    try:
        return hosted.read_progress()
    except Exception:  # what a guest wrote into its memory can't be allowed to end a host
        _log.exception("can't read the guest's counters")
        return None


def _migration(migration: Migration | None) -> m.MigrationStatus | None:
    if migration is None:
        return None
    return m.MigrationStatus(
        migration=migration.id,
        destination=migration.destination,
        status=migration.status,
        error=migration.error,
        seconds=(migration.ended or time.monotonic()) - migration.begun,
        cancel_requested=migration.cancel_requested,
        progress=migration.progress,
    )
