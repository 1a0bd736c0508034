"""What is counted and measured."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from amig.stats import Histogram, LinkMeter


def test_an_empty_histogram_has_zeros() -> None:
    assert Histogram().percentile(0.5) == 0


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=300), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_right_within_nine_percent(values: list[int], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    ordered = sorted(values)
    exact = ordered[max(0, -int(-share * len(values) // 1) - 1)]
    assert exact / 1.1 <= histogram.percentile(share) <= max(exact * 1.1, exact + 1)
    assert histogram.max_ns == max(values)


def test_the_link_is_measured_only_while_it_is_being_sent_on() -> None:
    meter = LinkMeter()
    meter.begin(0)
    meter.end(1_000_000, 1 << 20)
    meter.begin(500_000_000)  # half a second of silence does not count
    meter.end(501_000_000, 1 << 20)
    assert abs(meter.bytes_per_s / ((1 << 20) * 1000) - 1) < 0.01


def test_connections_that_send_at_the_same_time_share_the_time() -> None:
    meter = LinkMeter(memory=1 << 40)
    meter.begin(0)
    meter.begin(0)
    meter.end(1_000_000, 1 << 20)
    meter.end(1_000_000, 1 << 20)
    assert abs(meter.bytes_per_s / ((2 << 20) * 1000) - 1) < 0.01


def test_the_gain_is_the_memory_that_a_byte_on_the_link_stands_for() -> None:
    meter = LinkMeter(memory=1 << 40)
    assert meter.gain == 1.0
    meter.begin(0)
    meter.end(1000, 100, 400)
    assert abs(meter.gain - 4.0) < 0.01
    meter.begin(1000)
    meter.end(2000, 100)
    assert abs(meter.gain - 2.5) < 0.01


def test_the_figure_follows_a_link_that_changes() -> None:
    meter = LinkMeter(memory=10 << 20)
    now = 0
    for nanoseconds in [1_000_000] * 100 + [10_000_000] * 100:
        meter.begin(now)
        now += nanoseconds
        meter.end(now, 1 << 20)
    assert meter.bytes_per_s < 1.1 * (1 << 20) * 100
