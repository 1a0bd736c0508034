"""What a channel promises to the two stages it joins."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig.stages.channel import BrokenChannel, ReceiveEnd, SendEnd, channel


async def blocked(task: asyncio.Task[None]) -> bool:
    """Whether a task still waits after everything that could run has run."""
    for _ in range(5):
        await asyncio.sleep(0)
    return not task.done()


async def test_items_come_out_in_the_order_they_went_in() -> None:
    send, receive = channel(100)
    for i in range(5):
        await send.send(i, 10)
    send.close()
    assert [i async for i in receive] == [0, 1, 2, 3, 4]


async def test_a_sender_waits_while_the_bytes_do_not_fit() -> None:
    send, receive = channel(100)
    await send.send("a", 60)
    task = asyncio.create_task(send.send("b", 60))
    assert await blocked(task)
    assert await anext(receive) == "a"
    await task
    assert send.statistics().used == 60
    assert send.statistics().high_water == 60


async def test_an_item_larger_than_the_channel_enters_only_an_empty_one() -> None:
    send, receive = channel(10)
    await send.send("large", 1000)
    task = asyncio.create_task(send.send("small", 1))
    assert await blocked(task)
    assert await anext(receive) == "large"
    await task
    task = asyncio.create_task(send.send("large", 1000))
    assert await blocked(task)
    assert await anext(receive) == "small"
    await task


async def test_wanted_waits_until_the_receiver_waits() -> None:
    send, receive = channel(100)
    task = asyncio.create_task(send.wanted())
    assert await blocked(task)
    taker = asyncio.create_task(anext(receive))  # type: ignore[arg-type]
    await asyncio.wait_for(task, 1)
    await send.send("a", 1)
    assert await taker == "a"
    task = asyncio.create_task(send.wanted())
    assert await blocked(task)
    receive.close()
    with pytest.raises(BrokenChannel):
        await task


async def test_closing_the_sending_end_lets_the_receiver_drain_and_end() -> None:
    send, receive = channel(100)
    await send.send("a", 1)
    send.close()
    assert [x async for x in receive] == ["a"]


async def test_closing_the_receiving_end_tells_a_waiting_sender() -> None:
    send, receive = channel(1)
    await send.send("a", 1)
    task = asyncio.create_task(send.send("b", 1))
    assert await blocked(task)
    receive.close()
    with pytest.raises(BrokenChannel):
        await task
    with pytest.raises(BrokenChannel):
        await send.send("c", 1)


async def test_an_error_in_the_sender_does_not_look_like_a_clean_end() -> None:
    send, receive = channel(10)
    with pytest.raises(ZeroDivisionError):
        async with send:
            raise ZeroDivisionError
    task = asyncio.create_task(anext(receive))  # type: ignore[arg-type]
    assert await blocked(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_receiver_loses_nothing_even_when_it_was_just_woken() -> None:
    send, receive = channel(10)
    first = asyncio.create_task(anext(receive))  # type: ignore[arg-type]
    second = asyncio.create_task(anext(receive))  # type: ignore[arg-type]
    await blocked(first)
    await send.send("a", 1)  # wakes the first, which is cancelled before it runs
    first.cancel()
    assert await asyncio.wait_for(second, 1) == "a"
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_cancelled_sender_passes_its_turn_on() -> None:
    send, receive = channel(1)
    await send.send("a", 1)
    first = asyncio.create_task(send.send("b", 1))
    second = asyncio.create_task(send.send("c", 1))
    await blocked(first)
    assert await anext(receive) == "a"  # wakes the first, which is cancelled before it runs
    first.cancel()
    await asyncio.wait_for(second, 1)
    assert await anext(receive) == "c"


@given(
    sizes=st.lists(st.integers(0, 20), max_size=60),
    limit=st.integers(1, 16),
    receivers=st.integers(1, 3),
    senders=st.integers(1, 3),
)
def test_whatever_the_sizes_nothing_is_lost_and_the_bound_holds(
    sizes: list[int], limit: int, receivers: int, senders: int
) -> None:
    async def run() -> None:
        send: SendEnd[tuple[int, int]]
        receive: ReceiveEnd[tuple[int, int]]
        send, receive = channel(limit)
        out: list[tuple[int, int]] = []
        work = iter(enumerate(sizes))

        async def feed() -> None:
            for item in work:
                await send.send(item, item[1])

        async def drain() -> None:
            async for item in receive:
                out.append(item)
                await asyncio.sleep(0)

        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for _ in range(receivers):
                group.create_task(drain())
            async with asyncio.TaskGroup() as feeders:
                for _ in range(senders):
                    feeders.create_task(feed())
            send.close()
        assert sorted(out) == list(enumerate(sizes))
        assert receive.statistics().high_water <= max(limit, *sizes, 0) if sizes else True

    asyncio.run(run())
