"""The dirty-log designs by name, and which of them this kernel can do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from amig.dirty.auto_clear import AutoClear
from amig.dirty.blind import Blind
from amig.dirty.exact import Exact
from amig.dirty.log import LogAbilities
from amig.dirty.migration_bitmap import MigrationBitmap
from amig.dirty.ring import Ring
from amig.dirty.slot_cache import SlotCache
from amig.dirty.strategy import Strategy

_ORDER: Final[tuple[type[Strategy], ...]] = (Exact, SlotCache, AutoClear, Ring, MigrationBitmap, Blind)

strategies: Final[Mapping[str, type[Strategy]]] = MappingProxyType({cls.name: cls for cls in _ORDER})
"""Every design, the recommended ones first."""


_ALIKE: Final = frozenset((Exact.name, SlotCache.name))


def interchangeable(one: str, other: str) -> bool:
    """Whether a log may go over from one design to the other while nobody is the exact user.

    exact and slot-cache keep C alike and differ only in what the exact user clears, so what one of them leaves is what
    the other expects: C is a part of every user's pending bits.
    """
    return one in _ALIKE and other in _ALIKE


def obstacle(name: str, abilities: LogAbilities) -> str | None:
    """Return why this kernel's log can't be used with the design of that name, or None when it can."""
    kind = strategies[name]
    if abilities.ring and kind is not Ring:
        return f"this guest was started with a dirty ring, which leaves no bitmap for {name}: use {Ring.name}"
    if kind is Ring and not abilities.ring:
        return f"{name} has to be chosen when the guest's host starts: amig run --dirty-ring SIZE"
    if kind.manual and not abilities.manual_clear:
        return f"{name} needs KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (Linux 5.2): use {best(abilities)}"
    return None


def offered(abilities: LogAbilities) -> tuple[str, ...]:
    """Return the names of all safe designs that this kernel can do, best first."""
    return tuple(name for name, cls in strategies.items() if not cls.unsafe and obstacle(name, abilities) is None)


def best(abilities: LogAbilities) -> str:
    """Return the design to use when nobody asked for one.

    That is exact, which no other beats in the model (docs/dirty-log.md); auto-clear on kernels before 5.2; ring where
    the host has chosen that.
    """
    return next(
        name
        for name, cls in strategies.items()
        if not cls.unsafe and (cls is Ring) == abilities.ring and (abilities.manual_clear or not cls.manual)
    )
