"""`amig.Reception` as a service embeds it."""

from __future__ import annotations

import asyncio

import pytest

from amig.errors import HostError
from amig.host.attach import open_control
from amig.host.hosted import How
from tests.moving import homes, receiving

__all__ = ["homes"]

pytestmark = pytest.mark.usefixtures("homes")


async def test_stopped_before_a_guest_came_nobody_waits_for_ever() -> None:
    async with receiving() as reception:
        arrived = asyncio.create_task(reception.arrived())
        ended = asyncio.create_task(reception.ended())
        async with await open_control(reception.service.name) as control:
            await control.stop()
        assert (await ended).how is How.STOPPED
        with pytest.raises(HostError, match="stopped before a guest arrived"):
            await arrived


async def test_waiting_can_be_given_up_and_taken_up_again() -> None:
    async with receiving() as reception:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await reception.arrived()
        waiting = asyncio.create_task(reception.arrived())
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])
