"""Snapshot files: whatever stands in one, its guest is filled and loaded whole, or nothing is left of it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from amig.errors import AmigError
from amig.session.restore import restore
from amig.transport.file import MAGIC
from amig.wire import messages

from . import streams
from .loops import complete
from .receiver import FencedGuest, a_block, hello, last_words, one_page, proven, round_end
from .target import Mutate, Target


async def read(path: str) -> FencedGuest:
    guest = FencedGuest()
    try:
        await restore(path, guest)
    except AmigError:
        assert guest.calls[-1:] in ([], ["discard"]), "something is left of a guest that was not whole"
    else:
        assert guest.calls == ["build", "load"]
    guest.check_memory()
    return guest


def run(data: bytes) -> None:
    file = os.memfd_create("amig-fuzz")
    try:
        os.write(file, data)
        complete(read(f"/proc/self/fd/{file}"))
    finally:
        os.close(file)


def mutate(data: bytes, most: int, seed: int, by: Mutate) -> bytes:
    return streams.mutate(data, most, seed, by, skip=len(MAGIC))


def seeds() -> Iterator[tuple[str, bytes]]:
    text = b"text".ljust(16) * 256
    start = MAGIC + hello(1)

    def words(rounds: int, pages: int, zero_pages: int) -> bytes:
        return b"".join(streams.cut(last_words(rounds, pages, zero_pages))[:-1])  # a file has no COMMIT

    yield "whole", start + a_block(2 * text, packed=True) + round_end(0, 3) + words(1, 2, 1)
    raw = one_page(5, text) + one_page(69, text, region=7, summed=False)
    yield "raw", start + raw + round_end(0, 2) + words(1, 2, 0)
    zero = np.array([1 << 6], np.uint64)
    again = one_page(6, text, packed=True) + round_end(0, 1) + one_page(6, b"", round=1, zero=zero) + round_end(1, 1)
    yield "two-rounds", start + again + words(2, 1, 1)
    yield "digests", MAGIC + b"".join(streams.cut(proven(messages.DIGESTS_FEATURE, messages.FULL_FEATURE))[:-1])
    yield "empty", start + round_end(0, 0) + words(1, 0, 0)


TARGET = Target(name="snapshot", run=run, seeds=seeds, most=12 << 10, memory=32 << 20, mutate=mutate)
