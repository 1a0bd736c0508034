"""Work whose caller is cancelled is seen to its end before the cancellation passes."""

from __future__ import annotations

import asyncio

import pytest

from amig.aio import finish, settled, to_its_end


async def cancelled_while_waiting(waiting: asyncio.Task[object], gate: asyncio.Event) -> None:
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done(), "it did not wait for the work"
    gate.set()


async def test_finish_returns_what_the_work_returned() -> None:
    assert await finish(asyncio.ensure_future(asyncio.sleep(0, 42))) == 42


async def test_a_cancelled_wait_sees_the_work_end_and_undoes_it() -> None:
    gate, undone = asyncio.Event(), []

    async def work() -> int:
        await gate.wait()
        return 7

    waiting = asyncio.create_task(settled(work(), undone.append))
    await cancelled_while_waiting(waiting, gate)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert undone == [7]


async def test_a_failure_that_nobody_waits_for_any_more_gives_way_to_the_cancellation() -> None:
    gate = asyncio.Event()

    async def work() -> None:
        await gate.wait()
        raise ZeroDivisionError

    waiting = asyncio.create_task(settled(work()))
    await cancelled_while_waiting(waiting, gate)
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_of_a_promise_the_failure_is_told_even_to_the_impatient() -> None:
    gate = asyncio.Event()

    async def work() -> None:
        await gate.wait()
        raise ZeroDivisionError

    waiting = asyncio.create_task(to_its_end(work()))
    await cancelled_while_waiting(waiting, gate)
    with pytest.raises(ZeroDivisionError):
        await waiting


async def test_a_promise_that_was_kept_is_followed_by_the_cancellation() -> None:
    gate = asyncio.Event()
    waiting = asyncio.create_task(to_its_end(gate.wait()))
    await cancelled_while_waiting(waiting, gate)
    with pytest.raises(asyncio.CancelledError):
        await waiting
