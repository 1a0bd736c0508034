"""What a simulated guest does: the words of the guest image's command line that mean something without a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from amig.errors import AmigError, UsageError
from amig.host.guest_abi import MAX_CPUS, PAGE_SIZE, Fill, Work, Write
from amig.units import parse_size

_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]
_Percent = Annotated[int, msgspec.Meta(ge=0, le=100)]
_Micros = Annotated[int, msgspec.Meta(ge=50, le=10_000_000)]

IGNORED: Final = frozenset({"report", "spin", "tsc_khz", "vcpus"})
"""Words of the image that make no difference here."""


class SimOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A simulated guest's workload; see guest/README.md. Travels in `SimMachine.describe`."""

    vcpus: Annotated[int, msgspec.Meta(ge=1, le=MAX_CPUS)] = 1
    workload: Work = Work.IDLE
    ws: _Count | None = None
    """Bytes; None is half of memory (nothing when idle)."""
    rate: _Count = 0
    """Bytes a second of all vCPUs together; 0 is unpaced."""
    write: Write = Write.BYTE
    hot_writes: _Percent = 90
    hot_pages: Annotated[int, msgspec.Meta(ge=1, le=100)] = 10
    fill: Fill = Fill.NONE
    fill_size: _Count | None = None
    """Bytes filled before the workload starts; None is the working set."""
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 1
    tick_us: _Micros = 1000
    slice_us: _Micros = 1000
    burst_us: Annotated[int, msgspec.Meta(ge=100, le=10_000_000)] = 50_000
    crash: bool = False
    """Stop with an error once running, to test what surrounds a guest."""
    cmdline: Annotated[str, msgspec.Meta(max_length=65536)] = ""

    @classmethod
    def parse(cls, cmdline: str, *, vcpus: int = 1) -> SimOptions:
        """Read a command line as the guest image does: unknown words are ignored, a wrong value is a `UsageError`."""
        values: dict[str, object] = {"vcpus": vcpus, "cmdline": cmdline}
        for word in cmdline.split():
            key, equals, value = word.partition("=")
            if not equals or key in IGNORED or key not in _WORDS:
                continue
            try:
                values |= _WORDS[key](value)
            except (KeyError, ValueError, AmigError) as error:
                raise UsageError(f"the simulated guest does not understand {word!r}") from error
        if values.get("workload") is Work.FILL:
            values.setdefault("fill", Fill.RANDOM)
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise UsageError(f"the simulated guest can't work with {cmdline!r}: {error}") from error

    @property
    def rate_pages(self) -> int:
        """Pages a second of all vCPUs together; 0 is unpaced, and the slowest pace is one."""
        return max(1, self.rate // PAGE_SIZE) if self.rate else 0


def _size(name: str) -> Callable[[str], dict[str, object]]:
    return lambda value: {name: parse_size(value.removesuffix("/s"))}


def _number(name: str) -> Callable[[str], dict[str, object]]:
    return lambda value: {name: int(value)}


def _hot(value: str) -> dict[str, object]:
    writes, _, pages = value.partition(":")
    return {"hot_writes": int(writes), "hot_pages": int(pages)}


def _crash(value: str) -> dict[str, object]:
    return {"crash": {"none": False, "fault": True, "shutdown": True}[value]}


def _nothing_else(name: str) -> Callable[[str], dict[str, object]]:
    def refuse(value: str) -> dict[str, object]:
        raise ValueError(f"{name} needs a real guest")

    return refuse


_WORDS: Final[dict[str, Callable[[str], dict[str, object]]]] = {
    "workload": lambda value: {"workload": Work[value.upper()]},
    "fill": lambda value: {"fill": Fill[value.upper()]},
    "write": lambda value: {"write": Write[value.upper()]},
    "ws": _size("ws"),
    "rate": _size("rate"),
    "fill_size": _size("fill_size"),
    "hot": _hot,
    "seed": _number("seed"),
    "tick_us": _number("tick_us"),
    "slice_us": _number("slice_us"),
    "burst_us": _number("burst_us"),
    "crash": _crash,
    "ws_from": _nothing_else("ws_from"),
    "seconds": _nothing_else("seconds"),
}
