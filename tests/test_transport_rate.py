"""The rate limit: its arithmetic with time passed in, and the waiting around it."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig.transport.rate import BURST_BYTES, BURST_SECONDS, RateLimiter, TokenBucket

MIB = 1 << 20


def test_nothing_waits_without_a_limit():
    bucket = TokenBucket(None, 0.0)
    bucket.spend(1 << 60, 0.0)
    assert bucket.wait(0.0) == 0.0


def test_what_is_sent_is_paid_off_at_the_rate():
    bucket = TokenBucket(1000.0, 10.0)
    assert bucket.wait(10.0) == 0.0
    bucket.spend(500, 10.0)
    assert bucket.wait(10.0) == pytest.approx(0.5)
    assert bucket.wait(10.3) == pytest.approx(0.2)
    assert bucket.wait(10.5) == pytest.approx(0.0)


def test_a_pause_earns_no_more_than_the_burst():
    slow, fast = TokenBucket(1000.0, 0.0), TokenBucket(1e9, 0.0)
    for bucket, burst in ((slow, BURST_BYTES), (fast, 1e9 * BURST_SECONDS)):
        bucket.spend(int(burst), 10_000.0)
        assert bucket.wait(10_000.0) == 0.0
        bucket.spend(1000, 10_000.0)
        assert bucket.wait(10_000.0) == pytest.approx(1000 / bucket.rate)


def test_a_new_rate_counts_from_now_and_what_is_owed_is_paid_at_it():
    bucket = TokenBucket(1000.0, 0.0)
    bucket.spend(1000, 0.0)
    bucket.set_rate(100.0, 0.5)
    assert bucket.wait(0.5) == pytest.approx(5.0)
    bucket.set_rate(None, 0.5)
    assert bucket.wait(0.5) == 0.0
    bucket.set_rate(1000.0, 0.5)
    assert bucket.wait(0.5) == 0.0, "a debt does not survive the absence of a limit"


def test_time_that_goes_backwards_earns_nothing():
    bucket = TokenBucket(1000.0, 10.0)
    bucket.spend(1000, 10.0)
    assert bucket.wait(5.0) == pytest.approx(1.0)
    assert bucket.wait(10.0) == pytest.approx(1.0)


@pytest.mark.parametrize("rate", [0, -1.0, float("nan")])
def test_a_rate_that_moves_nothing_is_refused(rate):
    with pytest.raises(ValueError, match="a rate of"):
        TokenBucket(rate, 0.0)


@given(st.lists(st.tuples(st.integers(1, 4 * MIB), st.floats(0, 0.01)), min_size=1, max_size=200))
def test_over_any_time_no_more_passes_than_rate_and_burst_allow(takes):
    rate, now, sent = 1e8, 0.0, 0
    bucket = TokenBucket(rate, now)
    for size, late in takes:
        now += bucket.wait(now) + late
        assert bucket.wait(now) == pytest.approx(0.0, abs=1e-9)
        assert sent <= rate * now + BURST_BYTES + 1
        bucket.spend(size, now)
        sent += size


async def test_takers_are_served_in_turn():
    limiter = RateLimiter(100e6)
    order = []

    async def taker(name):
        await limiter.take(MIB)
        order.append(name)

    async with asyncio.TaskGroup() as group:
        for name in range(5):
            group.create_task(taker(name))
    assert order == [0, 1, 2, 3, 4]


async def test_raising_the_rate_wakes_who_waits():
    limiter = RateLimiter(1.0)
    await limiter.take(10 * MIB)
    waiting = asyncio.create_task(limiter.take(MIB))
    await asyncio.sleep(0)
    assert not waiting.done()
    limiter.set_rate(None)
    await waiting
    assert limiter.rate is None
    await limiter.take(1 << 60)


async def test_a_cancelled_taker_has_taken_nothing_and_lets_the_next_through():
    limiter = RateLimiter(1.0)
    await limiter.take(MIB)
    first, second = asyncio.create_task(limiter.take(1 << 60)), asyncio.create_task(limiter.take(MIB))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    limiter.set_rate(1e12)
    await second
