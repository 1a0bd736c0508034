"""The seams of dirty logging: what the kernel offers, what a user of the log sees, and what a strategy decides.

`KernelLog` is GET and CLEAR for one slot: KVM's (`amig.kvm`) or the exact model's (`amig.sim`). The hub owns it and
serves many users; a `Strategy` tells the hub which bits to clear in the kernel, and is three pure functions over
bitmaps, so that the very class that runs on KVM is the one that is proven in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from amig.memory import Words


@dataclass(frozen=True, slots=True, kw_only=True)
class LogAbilities:
    """What this kernel's dirty log can do."""

    manual_clear: bool
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: GET only reads, CLEAR clears."""
    initially_set: bool
    """KVM_DIRTY_LOG_INITIALLY_SET: a new log starts all ones and nothing is write-protected until cleared."""
    ring: bool = False
    """Dirty rings instead of bitmaps; `KernelLog.clear` may then clear more, of what GET has returned."""


class KernelLog(Protocol):
    """The kernel's dirty bitmap of every slot. Calls block; the hub serialises them."""

    abilities: LogAbilities

    def start(self, slot: int, *, manual: bool) -> None:
        """Switch logging on for a slot; ``manual`` must be the same for all slots of a VM."""

    def stop(self, slot: int) -> None:
        """Switch it off; the bitmap is gone."""

    def get(self, slot: int, out: Words) -> None:
        """Fill ``out`` (one bit a page of the slot). Clears everything it returns unless ``manual``."""

    def clear(self, slot: int, first: int, count: int, words: Words) -> None:
        """Write-protect again and forget the pages whose bits are set; KVM api.rst 4.117.

        ``first`` is a multiple of 64, ``count`` too unless it ends the slot.
        """


class ExternalLog(Protocol):
    """A log that another process keeps of what it writes, by guest-physical address; `amig.dirty.vhost.VhostLog`."""

    def harvest(self) -> Words | None:
        """Take and clear its bits, in one atomic step for each word: bit i is the page at address 4096 i.

        The array is the caller's until the next harvest; None when no bit is set. Never fails half-way.
        """


class LogUser(Protocol):
    """One user's view of the hub: its own pending bits at its own pace. Thread-safe; calls block."""

    def sync(self) -> dict[int, Words]:
        """GET, hand the bits to every user, and return a copy of this user's pending bits by region.

        The arrays are the caller's until this user's next ``sync``.
        """

    def take_and_clear(self, region: int, first: int, count: int, generation: int) -> Words:
        """Take the pending bits of a range and clear in the kernel what the strategy allows, as one atomic step.

        The range needs no alignment; bit 0 of the result is page ``first``. ``generation`` is that of the memory map
        which the caller goes by (design rule 5).
        """

    def give_back(self, region: int, first: int, taken: Words) -> None:
        """Return bits that were taken but not delivered."""

    def close(self) -> None:
        """Leave; the last user switches logging off. Idempotent."""
