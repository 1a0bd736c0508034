"""Sizes, rates and times as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amig import units
from amig.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("512KiB", 512 << 10),
        ("1400MiB", 1400 << 20),
        ("1GiB", 1 << 30),
        ("1gib", 1 << 30),
        ("1.5G", 3 << 29),
        (".5k", 512),
        ("2T", 2 << 40),
        ("1kB", 1000),
        ("1.5 MB", 1_500_000),
        ("3GB", 3_000_000_000),
        (" 7 ", 7),
    ],
)
def test_sizes(text, size):
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "-1",
        "1,5G",
        "1e9",
        "0x10",
        "1.5",
        "1.5B",
        "1XiB",
        "1GiB/s",
        "1bit",
        "inf",
        "nan",
        "9" * 21,
        "99999999T",
    ],
)
def test_what_is_not_a_size_is_refused_and_told_how_to_write_one(text):
    with pytest.raises(UsageError, match="write a size such as"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1250MB/s", 1_250_000_000),
        ("100MiB/s", 100 << 20),
        ("100MiB", 100 << 20),
        ("1G", 1 << 30),
        ("4Gbit/s", 500_000_000),
        ("4Gbit", 500_000_000),
        ("10 Gbit/s", 1_250_000_000),
        ("8000bit/s", 1000),
        ("1234", 1234),
    ],
)
def test_rates(text, rate):
    assert units.parse_rate(text) == rate


def test_a_rate_may_be_unlimited():
    assert units.parse_rate("unlimited") is None


@pytest.mark.parametrize("text", ["1Mb/s", "1mb", "1b/s", "8Mbps"])
def test_a_rate_that_may_mean_bits_or_bytes_is_refused(text):
    with pytest.raises(UsageError, match="bits or bytes"):
        units.parse_rate(text)


@pytest.mark.parametrize("text", ["0", "0MB/s", "", "fast", "1MB/h", "-1MB/s", "1GB/s/s"])
def test_what_is_not_a_rate_is_refused(text):
    with pytest.raises(UsageError, match="write a rate such as"):
        units.parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10ms", 0.01),
        ("500us", 0.0005),
        ("500µs", 0.0005),
        ("250ns", 2.5e-7),
        ("2s", 2.0),
        ("1.5s", 1.5),
        ("5min", 300.0),
        ("1h", 3600.0),
        ("0", 0.0),
        ("10 MS", 0.01),
    ],
)
def test_times(text, seconds):
    assert units.parse_duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("text", ["10", "", "ms", "-1s", "1d", "1m", "999999999h"])
def test_what_is_not_a_time_is_refused(text):
    with pytest.raises(UsageError, match="write a time such as"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1400 << 20, "1.37 GiB"),
        (1023.99 * 1024, "1 MiB"),
        (3 << 29, "1.5 GiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_sizes_are_shown_with_three_figures(size, text):
    assert units.format_size(size) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(None, "unlimited"), (0, "0 B/s"), (1.25e9, "1.25 GB/s"), (999.99e6, "1 GB/s"), (123.4e6, "123 MB/s")],
)
def test_rates_are_shown_in_thousands(rate, text):
    assert units.format_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.00005, "50 µs"),
        (0.00123, "1.23 ms"),
        (0.0999, "99.9 ms"),
        (0.99999, "1 s"),
        (4.561, "4.56 s"),
        (200, "3 min 20 s"),
        (7260, "2 h 1 min"),
        (-0.002, "-2 ms"),
    ],
)
def test_times_are_shown_readably(seconds, text):
    assert units.format_duration(seconds) == text


@given(st.text(max_size=30))
def test_any_text_is_understood_or_refused_by_name(text):
    for parse in (units.parse_size, units.parse_rate, units.parse_duration):
        try:
            value = parse(text)
        except UsageError:
            continue
        assert value is None or value >= 0


@given(st.integers(0, 2**62))
def test_a_plain_number_of_bytes_is_itself(size):
    assert units.parse_size(str(size)) == size
    assert units.parse_size(f"{size}B") == size
