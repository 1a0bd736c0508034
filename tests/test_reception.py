"""`amig.Reception` as a service embeds it."""

from __future__ import annotations

import asyncio

import pytest

from amig.errors import HostError, Refused
from amig.host.attach import open_control
from amig.host.hosted import How
from amig.session.asking import query
from amig.session.questions import UNKNOWN
from amig.transport import Dialer
from amig.transport.framed import FramedConnection
from amig.wire.messages import Refuse, Resume
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


async def test_a_source_that_comes_back_to_a_receiver_started_anew_does_not_end_it() -> None:
    async with receiving(once=True) as reception:
        link = FramedConnection(await Dialer(reception.address).connect(timeout=5))
        try:
            await link.send_message(Resume(migration="f" * 32, token=bytes(32), since=0, round=1))
            answer = await link.receive()
            assert isinstance(answer, Refuse)
            assert answer.code == UNKNOWN
        finally:
            link.abort()
        # Whoever comes after it is looked at: it waits on.
        with pytest.raises(Refused, match="nothing is known"):
            await query(Dialer(reception.address), "f" * 32)
