"""Asking amig's own guest image for its verdict on its memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from amig.control.operator import ControlClient
from amig.control.types import GuestProgress
from amig.errors import GuestError
from amig.host.attach import open_control

_POLL = 0.02


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest says of its own memory."""

    intact: bool
    verified_pages: int
    """Read and compared in the complete pass that was asked for."""
    mismatches: int
    """All that it ever found."""
    answered: bool = True


def describe(verdict: Verdict) -> str:
    """Return the verdict for people."""
    if not verdict.answered:
        return "NONE: the guest does not answer"
    if verdict.intact:
        return f"INTACT: the guest has verified all {verdict.verified_pages} pages of its working set"
    return f"DAMAGED: the guest found {verdict.mismatches} mismatches in its memory"


async def ask_verdict(name: str, timeout: float) -> Verdict:
    """Have the guest of that name verify its memory. Raises `ControlError`, `GuestError`."""
    async with await open_control(name, client="amig verify") as control:
        if (await control.status()).guest is None:
            raise GuestError(f"guest {name} is not amig's own image, or has not booted yet: it can't be asked")
        guest = await until(control, lambda guest: guest.state == "running", timeout)
        if guest.workload != "check":
            raise GuestError(
                f"guest {name} has workload {guest.workload}: only check knows what its memory should hold"
            )
        return await verdict_of(control, timeout)


async def verdict_of(control: ControlClient, timeout: float, *, pages: int | None = None) -> Verdict:
    """Have a running, checking guest verify its memory; ``pages`` is how many it should verify, where that is known."""
    number = await control.ask_guest("verify")
    try:
        guest = await until(control, lambda guest: guest.verify_done >= number, timeout)
    except GuestError:
        return Verdict(intact=False, verified_pages=0, mismatches=0, answered=False)
    mismatches = guest.mismatches + guest.verify_mismatches
    whole = guest.verify_pages > 0 if pages is None else guest.verify_pages == pages
    return Verdict(intact=whole and not mismatches, verified_pages=guest.verify_pages, mismatches=mismatches)


async def until(control: ControlClient, condition: Callable[[GuestProgress], bool], timeout: float) -> GuestProgress:
    """Ask until the guest's counters fulfil ``condition``; raises `GuestError` when they don't in time."""
    deadline = time.monotonic() + timeout
    while True:
        status = await control.status()
        if status.guest is not None and condition(status.guest):
            return status.guest
        if status.state in ("failed", "stopped") or (status.guest is not None and status.guest.state == "fault"):
            raise GuestError(f"guest {status.name} has ended: {status.reason or 'it took an exception'}")
        if status.guest is not None and status.guest.state == "error":
            raise GuestError(f"guest {status.name} can't work: its serial port says why")
        if time.monotonic() > deadline:
            raise GuestError(f"guest {status.name} did not answer within {timeout:g} s")
        await asyncio.sleep(_POLL)
