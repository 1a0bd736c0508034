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
from amig.dirty.slot_cache import SlotCache
from amig.dirty.strategy import Strategy

_ORDER: Final[tuple[type[Strategy], ...]] = (SlotCache, Exact, AutoClear, MigrationBitmap, Blind)

strategies: Final[Mapping[str, type[Strategy]]] = MappingProxyType({cls.name: cls for cls in _ORDER})
"""Every design, the recommended ones first."""


def offered(abilities: LogAbilities) -> tuple[str, ...]:
    """Return the names of all safe designs that this kernel can do, best first."""
    return tuple(
        name for name, cls in strategies.items() if not cls.unsafe and (abilities.manual_clear or not cls.manual)
    )


def best(abilities: LogAbilities) -> str:
    """Return the design to use when nobody asked for one: slot-cache, or auto-clear on kernels before 5.2."""
    return offered(abilities)[0]
