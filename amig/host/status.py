"""What `amig status` shows, gathered."""

from __future__ import annotations

import enum
import logging
import os
import time

import numpy as np
import numpy.typing as npt

from amig.control import replies as rp
from amig.control import types
from amig.dirty.hub import LogUserStatus
from amig.errors import AmigError
from amig.host import guest_abi
from amig.host.hosted import HostedGuest, Migration

_log = logging.getLogger(__name__)


async def status(hosted: HostedGuest, *, request: int, consoles: int) -> rp.StatusIs:
    """Return everything there is to know of a host."""
    users: tuple[LogUserStatus, ...] = ()
    progress: types.GuestProgress | None = None
    strategy = ""
    if hosted.has_machine:
        hub = hosted.hub
        strategy = hub.strategy or ""
        users = await hosted.vm.call(lambda: hub.users)
        progress = await hosted.vm.call(_progress, hosted)
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
        guest=progress,
    )


def _progress(hosted: HostedGuest) -> types.GuestProgress | None:
    """Read what our own guest image counts; its memory is as hostile as any."""
    try:
        memory = hosted.machine.memory.read(0, guest_abi.SHARED_END)
        if not guest_abi.present(memory):
            return None
        found = guest_abi.parse_status(memory)
        cpus = guest_abi.parse_cpus(memory, int(found["vcpus"]))
        return types.GuestProgress(
            state=_word(guest_abi.State, int(found["state"])),
            workload=_word(guest_abi.Work, int(found["workload"])),
            heartbeat=_sum(cpus["heartbeat"]),
            writes=_sum(cpus["writes"]),
            verified=_sum(cpus["verified"]),
            passes=min(int(cpus["passes"].min()), _MOST),
            mismatches=_sum(cpus["mismatches"]),
        )
    except AmigError as error:
        _log.debug("the guest's counters can't be read: %s", error)
        return None


_MOST = 2**63 - 1


def _sum(counters: npt.NDArray[np.uint64]) -> int:
    return min(int(counters.sum(dtype=np.uint64)), _MOST)


def _word(kind: type[enum.IntEnum], value: int) -> str:
    return kind(value).name.lower() if value in set(kind) else "unknown"


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
