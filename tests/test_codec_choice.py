"""Compression that decides for itself: on while it carries more than the raw path does, off while it does not."""

from __future__ import annotations

import numpy as np
import pytest

from amig.stages.codec_choice import SAMPLE_EVERY, CodecChoice
from amig.stats import LinkMeter

MB = 10**6


def link(rate: float) -> LinkMeter:
    """A link that has carried a second's worth at so many bytes a second."""
    meter = LinkMeter()
    meter.begin(0)
    meter.end(1_000_000_000, int(rate))
    return meter


def choice(rate: float, workers: int = 1) -> CodecChoice:
    return CodecChoice("auto", 1, workers, link(rate))


def learn(asked: CodecChoice, *, ratio: float, speed: float) -> None:
    asked.learn(raw=MB, packed=int(MB / ratio), seconds=MB / speed)


@pytest.mark.parametrize(
    ("rate", "ratio", "speed", "workers", "pays"),
    [
        (100 * MB, 3.0, 400 * MB, 1, True),  # a slow link: three times as much gets through
        (1000 * MB, 3.0, 400 * MB, 1, False),  # the worker is slower than the link
        (1000 * MB, 3.0, 400 * MB, 4, True),  # four are not
        (100 * MB, 1.0, 400 * MB, 1, False),  # nothing gets smaller
    ],
    ids=["slow-link", "slow-worker", "more-workers", "random-content"],
)
def test_it_compresses_where_that_carries_more(
    rate: float, ratio: float, speed: float, workers: int, pays: bool
) -> None:
    asked = choice(rate, workers)
    learn(asked, ratio=ratio, speed=speed)
    assert asked.compress() is pays


def test_what_is_not_known_is_not_compressed_but_looked_at_first_of_all() -> None:
    asked = choice(100 * MB)
    assert not asked.compress()
    assert asked.sample()


def test_a_link_that_was_never_measured_gets_what_is_raw() -> None:
    asked = CodecChoice("auto", 1, 1, LinkMeter())
    learn(asked, ratio=9.0, speed=400 * MB)
    assert not asked.compress()


def test_content_that_changes_is_found_by_samples() -> None:
    """From content that does not compress to content that does: a few samples turn it on."""
    asked = choice(100 * MB)
    learn(asked, ratio=1.0, speed=400 * MB)
    samples = 0
    while not asked.compress():
        if asked.sample():
            samples += 1
            learn(asked, ratio=3.0, speed=400 * MB)
        assert samples < 5
    assert samples


def test_one_block_in_a_few_is_sampled_and_none_where_the_operator_has_decided() -> None:
    asked = choice(100 * MB)
    assert np.flatnonzero([asked.sample() for _ in range(3 * SAMPLE_EVERY)]).tolist() == [
        0,
        SAMPLE_EVERY,
        2 * SAMPLE_EVERY,
    ]
    for mode, packs in (("none", False), ("zstd", True)):
        told = CodecChoice(mode, 1, 1, link(100 * MB))  # type: ignore[arg-type]
        assert not told.sample()
        assert told.compress() is packs
