"""What a host can see of amig's own guest image, and ask of it; the guest's memory is as hostile as any."""

from __future__ import annotations

import enum
import logging

import numpy as np
import numpy.typing as npt

from amig.control import types
from amig.control.requests import GuestWord
from amig.errors import AmigError
from amig.host import guest_abi
from amig.host.hosted import HostedGuest
from amig.host.machine import Machine

_log = logging.getLogger(__name__)
_MOST = 2**63 - 1
_WORDS = {"verify": "verify_request", "gap-reset": "gap_reset"}


async def ask_guest(hosted: HostedGuest, what: GuestWord) -> int:
    """Write a new number into a word of the control page; returns it. Raises `ControlError`, `GuestError`."""
    return await hosted.while_running(f"ask it to {what}", lambda machine: _ask(machine, what))


def _ask(machine: Machine, what: GuestWord) -> int:
    memory = machine.memory
    guest_abi.parse_status(memory.read(0, guest_abi.SHARED_END))  # raises unless the guest is one of ours
    dtype, offset = guest_abi.CONTROL.fields[_WORDS[what]][:2]  # type: ignore[index]
    place = guest_abi.CONTROL_GPA + offset
    number = (int.from_bytes(memory.read(place, dtype.itemsize), "little") + 1) & _MOST
    memory.write(place, number.to_bytes(dtype.itemsize, "little"))
    return number


def progress(hosted: HostedGuest) -> types.GuestProgress | None:
    """Return what the image counts, or None for any other guest. Blocks shortly."""
    try:
        memory = hosted.machine.memory.read(0, guest_abi.SHARED_END)
        if not guest_abi.present(memory):
            return None
        found = guest_abi.parse_status(memory)
        cpus = guest_abi.parse_cpus(memory, int(found["vcpus"]))
    except AmigError as error:
        _log.debug("the guest's counters can't be read: %s", error)
        return None
    return types.GuestProgress(
        state=_word(guest_abi.State, int(found["state"])),
        workload=_word(guest_abi.Work, int(found["workload"])),
        heartbeat=_sum(cpus["heartbeat"]),
        writes=_sum(cpus["writes"]),
        verified=_sum(cpus["verified"]),
        passes=_bounded(cpus["passes"].min()),
        mismatches=_sum(cpus["mismatches"]),
        verify_done=_bounded(cpus["verify_done"].min()),
        verify_pages=_sum(cpus["verify_pages"]),
        verify_mismatches=_sum(cpus["verify_mismatches"]),
        gap_ack=_bounded(cpus["gap_ack"].min()),
        gap_max_ns=_bounded(int(cpus["gap_max"].max()) * 1_000_000 // max(int(found["tsc_khz"]), 1)),
    )


def _sum(counters: npt.NDArray[np.uint64]) -> int:
    return _bounded(counters.sum(dtype=np.uint64))


def _bounded(number: int | np.uint64) -> int:
    return min(int(number), _MOST)


def _word(kind: type[enum.IntEnum], value: int) -> str:
    return kind(value).name.lower() if value in set(kind) else "unknown"
