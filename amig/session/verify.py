"""How the two sides agree on verifying memory, and the hashing of all of it while the guest is paused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from amig import bitmap
from amig.digest import KEY_BYTES, PageDigests, PageRange, Verify, hash_all, named, present
from amig.errors import PeerError, VerifyFailed
from amig.guest import Incoming
from amig.memory import GuestMemory, Region
from amig.wire.limits import MAX_PAGE_DIGESTS
from amig.wire.messages import DIGESTS_FEATURE, FULL_FEATURE, Digests, Hello

FEATURES: tuple[str, ...] = (DIGESTS_FEATURE, FULL_FEATURE)
"""Features of the protocol that this side knows."""

MAX_KEPT = 64
"""Runs of differing pages that are remembered by name."""


def features(mode: Verify) -> tuple[str, ...]:
    """Return the features that a source requires for this."""
    return {"digests": (DIGESTS_FEATURE,), "full": (DIGESTS_FEATURE, FULL_FEATURE), "off": ()}[mode]


def check_features(hello: Hello, agreed: Iterable[str]) -> None:
    """Raise `PeerError` for a HELLO whose key and features don't fit one another."""
    digests = DIGESTS_FEATURE in agreed
    if len(hello.digest_key) != (KEY_BYTES if digests else 0) or (FULL_FEATURE in agreed and not digests):
        raise PeerError(f"the source sent a digest key of {len(hello.digest_key)} bytes for what it wants compared")


def digests(regions: Iterable[Region], key: bytes) -> PageDigests | None:
    """Return the digests to be kept under ``key``; None for the empty one: nothing is compared."""
    return PageDigests(regions, int.from_bytes(key, "little")) if key else None


def hash_memory(memory: GuestMemory, regions: Iterable[Region], key: bytes) -> Iterator[Digests]:
    """Yield the digests of all memory, in order, each part hashed when it is asked for; the guest must be paused."""
    for region in regions:
        # Asked once: the kernel looks for the end of a run to its end, however little of it is wanted.
        data = present(region.pages, memory.data_ranges(region.id, 0, region.pages))
        for first in range(0, region.pages, MAX_PAGE_DIGESTS):
            some = data[first : first + MAX_PAGE_DIGESTS]
            found = hash_all(memory.pages(region.id), first, some, int.from_bytes(key, "little"))
            yield Digests(region=region.id, first=first, digests=found.astype("<u8").tobytes())


class FullCheck:
    """The destination's side of `hash_memory`: hashes its own memory part by part and remembers what differs."""

    def __init__(self, guest: Incoming, hello: Hello) -> None:
        self._guest = guest
        self._key = int.from_bytes(hello.digest_key, "little")
        self._todo = list(hello.memory.regions[::-1])
        self._next = 0
        self._present = np.zeros(0, np.bool_)
        self._pages = 0
        self._differing: list[PageRange] = []

    def compare(self, message: Digests) -> None:
        """Compare one part; all memory must be in place. Raises `PeerError` unless it is the part that is due."""
        region = self._todo[-1] if self._todo else None
        count, odd = divmod(len(message.digests), 8)
        if region is None or odd or (message.region, message.first) != (region.id, self._next):
            raise PeerError("the peer sent digests of pages out of order")
        if self._next + count > region.pages:
            raise PeerError(f"the peer sent digests of pages that leave region {region.id}")
        if self._next == 0:
            self._present = present(region.pages, self._guest.data_ranges(region.id, 0, region.pages))
        some = self._present[self._next : self._next + count]
        mine = hash_all(self._guest.pages(region.id), self._next, some, self._key)
        self._note(region.id, mine != np.frombuffer(message.digests, "<u8"))
        self._next += count
        if self._next == region.pages:
            self._todo.pop()
            self._next = 0

    def _note(self, region: int, differs: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> None:
        wrong = np.flatnonzero(differs)
        self._pages += len(wrong)
        if len(wrong) and len(self._differing) < MAX_KEPT:
            for first, count in zip(*bitmap.runs(bitmap.from_pages(wrong, len(differs))), strict=True):
                self._differing.append(PageRange(region=region, first=self._next + int(first), count=int(count)))

    def finish(self) -> None:
        """Raise `VerifyFailed` that names the pages that differ, `PeerError` when not all were compared."""
        if self._todo:
            raise PeerError("the peer did not send the digests of all pages")
        if self._pages:
            raise VerifyFailed(
                f"{self._pages} pages of guest memory at the destination differ from the source's: "
                f"{named(self._differing)}"
            )
