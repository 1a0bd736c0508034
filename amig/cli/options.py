"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, TypeVar

import typer

from amig.errors import UsageError
from amig.units import parse_duration, parse_rate, parse_size

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output, for programs.")]
Detach = Annotated[
    bool, typer.Option("--detach", help="Host in the background: returns once it is up, or says why not.")
]
HugePages = Annotated[bool, typer.Option("--hugepages", help="Guest memory from 2 MiB huge pages (vm.nr_hugepages).")]
Serial = Annotated[
    str, typer.Option("--serial", metavar="WHERE", help="Where the serial port goes: file:PATH, stdio or none.")
]
GuestName = Annotated[str, typer.Argument(metavar="NAME", help="The guest's name, or the path of its control socket.")]
Lifeline = Annotated[bool, typer.Option("--lifeline", hidden=True, help="End when standard input does.")]


class Engine(StrEnum):
    """What runs the guest."""

    KVM = "kvm"
    SIMULATOR = "simulator"


class Compression(StrEnum):
    """``--compression``."""

    NONE = "none"
    ZSTD = "zstd"
    AUTO = "auto"


class OnTimeout(StrEnum):
    """``--on-timeout``."""

    CANCEL = "cancel"
    SWITCH = "switch"


def size(option: str, text: str) -> int:
    """Return the bytes that an option's value means; raises `UsageError` that names the option."""
    return _read(parse_size, option, text)


def rate(option: str, text: str) -> int | None:
    """Return bytes a second, None for unlimited; raises `UsageError` that names the option."""
    return _read(parse_rate, option, text)


def seconds(option: str, text: str) -> float:
    """Return seconds; raises `UsageError` that names the option."""
    return _read(parse_duration, option, text)


def _read(parse: Callable[[str], T], option: str, text: str) -> T:
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None
