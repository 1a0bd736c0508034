"""What pages hold: the contents of guest/check.c and guest/content.c, many pages at a time.

A checked page carries its number, its generation, and over all other words a pattern derived from both and the seed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from amig.host.guest_abi import Bad, Fill

U64 = npt.NDArray[np.uint64]

PAGE_WORDS: Final = 512

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_GENERATION: Final = np.uint64(0xD1342543DE82EF95)
_STEP: Final = np.uint64(0xD6E8FEB86659FD93)
_INDEX: Final = np.arange(PAGE_WORDS, dtype=np.uint64)
_COARSE: Final = _INDEX >> np.uint64(6)
_ONE: Final = np.uint64(1)

_TEXT: Final = np.frombuffer(
    b"the     guest   memory  page    of a    dirty   log and cleared then    written again.\n round   after   to the  "
    b"link,   which   sends   moves   it with little  downtimewhile   running in placechunk   by chunk(see    below)  "
    b"as long kept    source  target  ",
    dtype=np.uint64,
)


def mix(x: U64) -> U64:
    """Return 64 well-mixed bits for each number (the finaliser of SplitMix64, by Sebastiano Vigna)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def randoms(stream: int, first: int, count: int) -> U64:
    """Return numbers ``first`` to ``first + count - 1`` of a random sequence; its whole state is the position."""
    start = (stream * 0x2545F4914F6CDD1D + first) & (1 << 64) - 1
    return mix((np.uint64(start) + np.arange(count, dtype=np.uint64)) * _GOLDEN)


def below(random: U64, limit: int) -> npt.NDArray[np.int64]:
    """Return numbers below ``limit`` (at most 2^32) from the upper halves of random ones."""
    return (((random >> np.uint64(32)) * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)


def checked(numbers: npt.NDArray[np.int64], generations: npt.NDArray[np.uint32], seed: int, fill: Fill) -> U64:
    """Return what checked pages of these numbers and generations hold, shape ``(n, 512)``."""
    number = numbers.astype(np.uint64)
    generation = generations.astype(np.uint64)
    base = mix(number * _GOLDEN + generation * _GENERATION + np.uint64(seed))
    step = base * _STEP | _ONE
    if fill in (Fill.CONST, Fill.TEXT):
        index = _COARSE
    elif fill is Fill.MIXED:
        index = np.where((number & _ONE).astype(np.bool_)[:, None], _COARSE, _INDEX)
    else:
        index = _INDEX
    pages: U64 = index * step[:, None]
    pages += base[:, None]
    pages[:, 0] = number
    pages[:, 1] = generation
    return pages


def filled(numbers: npt.NDArray[np.int64], kind: Fill, seed: int, salt: int = 0) -> U64:
    """Return contents of the kind, shape ``(n, 512)``; another ``salt`` gives other contents."""
    number = numbers.astype(np.uint64)
    if kind in (Fill.NONE, Fill.ZERO):
        return np.zeros((number.size, PAGE_WORDS), dtype=np.uint64)
    constant = np.uint64(((0xA5 + salt) & 0xFF) * 0x0101010101010101)
    if kind is Fill.CONST:
        return np.full((number.size, PAGE_WORDS), constant)
    start = mix(number * _GOLDEN + np.uint64((seed + salt) & (1 << 63) - 1)) | _ONE
    noise = mix((start[:, None] + _INDEX) * _GOLDEN)
    if kind is Fill.TEXT:
        text: U64 = _TEXT[noise >> np.uint64(59)]
        return text
    if kind is Fill.MIXED:
        noise[(number & _ONE).astype(np.bool_)] = constant
    return noise


def what_is_wrong(page: U64, number: int, generation: int, seed: int, fill: Fill, total: int) -> tuple[Bad, int]:
    """Say in what way a checked page (shape ``(512,)``) is not what it should be, and from which word on."""
    as_should = checked(np.array([number]), np.array([generation], dtype=np.uint32), seed, fill)[0]
    different = np.flatnonzero(page != as_should)
    word = int(different[0]) if different.size else 0
    if not page.any():
        return Bad.ZERO, word
    found, found_generation = int(page[0]), int(page[1])
    if found >= total or found_generation >= 1 << 32:
        return Bad.GARBAGE, word
    as_found = checked(np.array([found]), np.array([found_generation], dtype=np.uint32), seed, fill)[0]
    if not np.array_equal(page, as_found):
        return (Bad.TORN if found == number else Bad.GARBAGE), word
    if found != number:
        return Bad.FOREIGN, word
    return (Bad.STALE if found_generation < generation else Bad.NEWER), word
