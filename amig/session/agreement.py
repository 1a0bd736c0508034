"""What is in place of the round under way, as HELD messages: told by the destination, checked by the source."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from amig import bitmap
from amig.errors import PeerError
from amig.memory import WORD_PAGES, MemoryMap, Region, Words
from amig.stages.resumption import Answer, PagesByRegion
from amig.wire.limits import MAX_HELD_BYTES
from amig.wire.messages import Held

_WORDS = MAX_HELD_BYTES // 8


def told(held: PagesByRegion) -> Iterator[Held]:
    """Yield the messages that name these pages; none for ranges without any."""
    for region, words in held.items():
        for first in range(0, len(words), _WORDS):
            some = words[first : first + _WORDS]
            if bitmap.any_set(some):
                yield Held(region=region, first=first * WORD_PAGES, pages=some.astype("<u8", copy=False).tobytes())


class Hearing:
    """Puts them together. They come in ascending order, so there can't be more of them than there is memory."""

    def __init__(self, memory: MemoryMap) -> None:
        self._left = list(memory.regions[::-1])
        self._next = 0
        self._held: dict[int, Words] = {}

    def add(self, message: Held) -> None:
        """Take one message. Raises `PeerError` for pages that the guest has not, or that were named before."""
        while self._left and self._left[-1].id != message.region:
            self._left.pop()
            self._next = 0
        count, odd = divmod(len(message.pages), 8)
        if not self._left or odd or message.first < self._next or message.first % WORD_PAGES:
            raise PeerError("the peer named pages that it holds out of order")
        region = self._left[-1]
        words = np.frombuffer(message.pages, "<u8").astype(np.uint64)
        start = message.first // WORD_PAGES
        if start + count > region.words or (start + count == region.words and words[-1] & ~_last(region)):
            raise PeerError(f"the peer named pages that it holds and that leave region {region.id}")
        self._held.setdefault(region.id, bitmap.zeros(region.pages))[start : start + count] = words
        self._next = message.first + count * WORD_PAGES

    def answer(self, rounds: int) -> Answer:
        """Return all of it."""
        return Answer(rounds=rounds, held=self._held)


def _last(region: Region) -> np.uint64:
    return bitmap.tail_mask(region.pages)
