"""Sizes, rates and times as people write them, and back.

Bytes: ``KiB MiB GiB TiB`` count in 1024, ``kB MB GB TB`` in 1000; a bare letter (``1.5G``) means 1024, as it does to
QEMU. Rates add ``/s`` (it may be left out) or are written in bits, ``Mbit/s``, which always count in 1000. Times need a
unit, because programs of this kind disagree on what a bare number means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Final

from amig.errors import UsageError

SIZE_FORMS: Final = "a size such as 512KiB, 1400MiB, 1.5GiB or 1G"
RATE_FORMS: Final = "a rate such as 1250MB/s, 100MiB/s, 4Gbit/s or unlimited"
TIME_FORMS: Final = "a time such as 500us, 10ms, 2s, 5min or 1h"

_NUMBER: Final = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,12})?|\.[0-9]{1,12})\s*([A-Za-zµμ/]*)\s*")
_LETTERS: Final = "kmgtp"
_BYTES: Final[Mapping[str, int]] = (
    {"": 1, "b": 1}
    | {f"{c}ib": 1024**i for i, c in enumerate(_LETTERS, 1)}
    | {c: 1024**i for i, c in enumerate(_LETTERS, 1)}
    | {f"{c}b": 1000**i for i, c in enumerate(_LETTERS, 1)}
)
_BITS: Final[Mapping[str, int]] = {"bit": 1} | {f"{c}bit": 1000**i for i, c in enumerate(_LETTERS, 1)}
_SECONDS: Final[Mapping[str, Decimal]] = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "μs": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
}
_MOST: Final = 2**63 - 1
_MOST_SECONDS: Final = 10 * 365 * 86400


def parse_size(text: str) -> int:
    """Return the bytes in ``text``; raises `UsageError` that says what is accepted."""
    number, unit = _split(text, SIZE_FORMS)
    factor = _BYTES.get(unit.lower())
    if factor is None:
        raise UsageError(f"{text!r} has no unit of size that we know: write {SIZE_FORMS}")
    size = number * factor
    if size > _MOST:
        raise UsageError(f"{text!r} is more than can be counted: write {SIZE_FORMS}")
    if unit.lower() in ("", "b") and size != int(size):
        raise UsageError(f"{text!r} is not a whole number of bytes: write {SIZE_FORMS}")
    return int(size)


def parse_rate(text: str) -> int | None:
    """Return the bytes per second in ``text``, None for "unlimited"; raises `UsageError` that says what is accepted."""
    if text.strip().lower() == "unlimited":
        return None
    number, unit = _split(text, RATE_FORMS)
    what = unit.removesuffix("/s")
    if re.fullmatch(r"[KMGTPkmgtp]?b(ps)?", what):
        raise UsageError(f"{text!r} may mean bits or bytes: write MB/s or Mbit/s")
    bits = _BITS.get(what.lower())
    factor = _BYTES.get(what.lower()) if bits is None else None
    if bits is None and factor is None:
        raise UsageError(f"{text!r} has no unit of rate that we know: write {RATE_FORMS}")
    rate = number * bits / 8 if bits is not None else number * (factor or 0)
    if not 1 <= rate <= _MOST:
        raise UsageError(f"{text!r} is not a rate to move memory at: write {RATE_FORMS}")
    return int(rate)


def parse_duration(text: str) -> float:
    """Return the seconds in ``text``; raises `UsageError` that says what is accepted."""
    number, unit = _split(text, TIME_FORMS)
    factor = _SECONDS.get(unit.lower())
    if factor is None:
        if not unit and not number:
            return 0.0
        raise UsageError(f"{text!r} needs a unit of time: write {TIME_FORMS}")
    seconds = number * factor
    if seconds > _MOST_SECONDS:
        raise UsageError(f"{text!r} is longer than anything waits: write {TIME_FORMS}")
    return float(seconds)


def format_size(size: float) -> str:
    """Return ``1.4 GiB`` and the like."""
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_rate(bytes_per_s: float | None) -> str:
    """Return ``1.25 GB/s`` and the like; ``unlimited`` for None."""
    if bytes_per_s is None:
        return "unlimited"
    return _scaled(bytes_per_s, 1000, ("B/s", "kB/s", "MB/s", "GB/s", "TB/s", "PB/s"))


def format_duration(seconds: float) -> str:
    """Return ``12.3 ms``, ``4.56 s``, ``3 min 20 s`` and the like."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds >= 3599.5:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60} min"
    if seconds >= 99.95:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60} s"
    if seconds >= 0.9995:
        return f"{_digits(seconds)} s"
    if seconds >= 0.0009995:
        return f"{_digits(seconds * 1e3)} ms"
    return f"{_digits(seconds * 1e6)} µs" if seconds else "0 s"


def _split(text: str, forms: str) -> tuple[Decimal, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not understood: write {forms}")
    return Decimal(match[1]), match[2]


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    if value < 0:
        return "-" + _scaled(-value, step, units)
    at = 0
    # 999.95 and more would be shown as 1000 of a unit whose next one reads better.
    while value >= step - 0.05 and at < len(units) - 1:
        value /= step
        at += 1
    return f"{round(value) if at == 0 else _digits(value)} {units[at]}"


def _digits(value: float) -> str:
    """Three figures that matter, at most two of them behind the point, no zeros for show."""
    places = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
