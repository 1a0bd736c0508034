"""What `amig status` shows, gathered."""

from __future__ import annotations

import dataclasses
import os
import time

from amig.control import replies as rp
from amig.control import types
from amig.dirty.hub import LogUserStatus
from amig.host.guest_image import progress
from amig.host.hosted import HostedGuest
from amig.host.life import Migration


async def status(hosted: HostedGuest, *, request: int, consoles: int) -> rp.StatusIs:
    """Return everything there is to know of a host."""
    users: tuple[LogUserStatus, ...] = ()
    seen: types.GuestProgress | None = None
    strategy = ""
    if hosted.has_machine:
        hub = hosted.hub
        strategy = hub.strategy or ""
        users = await hosted.vm.call(lambda: hub.users)
        seen = await hosted.vm.call(progress, hosted)
    machine = hosted.machine if hosted.has_machine else None
    doubt = hosted.in_doubt
    return rp.StatusIs(
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
        else rp.HandoverStatus(migration=doubt.migration, destination=doubt.destination, peer=doubt.peer),
        guest=seen,
    )


def log_counters(hosted: HostedGuest, *, request: int) -> rp.LogCountersAre:
    """Return what the dirty log has cost; raises `ControlError` (``wrong-state``) where there is no guest yet."""
    hub, log = hosted.hub, hosted.machine.log
    counted = {field.name: getattr(hub.counters, field.name) for field in dataclasses.fields(hub.counters)}
    return rp.LogCountersAre(
        id=request, strategy=hub.strategy or "", ring_full=getattr(log, "full_exits", 0), **counted
    )


def _migration(migration: Migration | None) -> rp.MigrationStatus | None:
    if migration is None:
        return None
    return rp.MigrationStatus(
        migration=migration.id,
        destination=migration.destination,
        status=migration.status,
        error=migration.error,
        seconds=(migration.ended or time.monotonic()) - migration.begun,
        cancel_requested=migration.cancel_requested,
        progress=migration.progress,
    )
