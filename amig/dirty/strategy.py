"""What a dirty-log design decides: which bits may be cleared in the kernel, and what users of the log are owed for it.

A strategy is three pure functions over bitmaps of one range: `Strategy.sync` after a GET, `Strategy.take` when a user
takes its pending bits, `Strategy.give_back` when it could not deliver them. It keeps no state: the hub holds, for each
region, the *cache* C (bits known to be set in the kernel and handed to every user) and each user's *pending* bits.
Because the functions use nothing but ``& | ~``, they work on numpy words and on Python ints alike, so that the class
which runs on KVM is the very class that is explored in the model.
"""

from __future__ import annotations

from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

from amig.memory import Words

Bits = TypeVar("Bits", Words, int)
"""A bitmap of a range: numpy words, or an int in the model. Bits past the range are zero."""


class Synced(NamedTuple, Generic[Bits]):
    """What follows from a GET."""

    cache: Bits
    """C afterwards."""
    news: Bits
    """Every user's pending bits gain these."""


class Step(NamedTuple, Generic[Bits]):
    """What follows from a user's taking all its pending bits of a range."""

    clear: Bits
    """CLEAR gets these; nothing outside of the range."""
    cache: Bits
    """C afterwards."""
    owed: Bits
    """Every *other* user's pending bits gain these, in the same atomic step. They are only possibly dirty."""


class Returned(NamedTuple, Generic[Bits]):
    """What follows from giving bits back."""

    cache: Bits
    """C afterwards."""
    pending: Bits
    """The user's pending bits gain these."""


class Strategy(Protocol):
    """A dirty-log design; see `amig.dirty.registry` for all of them and docs/dirty-log.md for why they differ."""

    name: ClassVar[str]
    """The word for it on the command line and in the guest protocol."""
    manual: ClassVar[bool]
    """Whether it needs KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""
    one_exact_user: ClassVar[bool]
    """Whether one user, the first to ask for the strategy by name, is treated apart (``exact`` in `take`)."""
    unsafe: ClassVar[bool]
    """Whether it is known to lose pages: for proofs and comparisons, never for a guest that anyone needs."""

    def sync(self, fresh: Bits, cache: Bits) -> Synced[Bits]:
        """Decide on ``fresh``, which GET has just returned."""

    def take(self, mine: Bits, cache: Bits, whole: Bits, *, exact: bool) -> Step[Bits]:
        """Decide what to clear when a user takes ``mine``, all its pending bits in a range; ``whole`` is the range."""

    def give_back(self, taken: Bits, cache: Bits) -> Returned[Bits]:
        """Decide on ``taken``, which this user took and did not deliver."""
