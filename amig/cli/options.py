"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from amig.errors import UsageError
from amig.units import format_size, parse_duration, parse_rate, parse_size

if TYPE_CHECKING:
    from amig.transport import LinkOptions

T = TypeVar("T")
_TRUST = "Trust"
HOST_PANEL = "Host"
LINK = "Link"
_ENTRY, _MIN_RING, _MAX_RING = 16, 4096, 1 << 20
"""Bytes of an entry of a dirty ring, and what KVM takes at least and at most; api.rst 8.29."""

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output, for programs.")]
Detach = Annotated[
    bool, typer.Option("--detach", help="Host in the background: returns once it is up, or says why not.")
]
HugePages = Annotated[bool, typer.Option("--hugepages", help="Guest memory from 2 MiB huge pages (vm.nr_hugepages).")]
Serial = Annotated[
    str, typer.Option("--serial", metavar="WHERE", help="Where the serial port goes: file:PATH, stdio or none.")
]
GuestName = Annotated[str, typer.Argument(metavar="NAME", help="The guest's name, or the path of its control socket.")]
DirtyRing = Annotated[
    str | None,
    typer.Option(
        "--dirty-ring",
        metavar="SIZE",
        help="Log dirty pages in a ring for each vCPU: so many entries, or bytes with a unit.",
        rich_help_panel=HOST_PANEL,
    ),
]
Lifeline = Annotated[bool, typer.Option("--lifeline", hidden=True, help="End when standard input does.")]


KeepAlive = Annotated[
    str,
    typer.Option(
        "--keepalive",
        metavar="TIME",
        help="Ask the other side for a sign of life when nothing has moved for so long.",
        rich_help_panel=LINK,
    ),
]
Stall = Annotated[
    str,
    typer.Option(
        "--stall",
        metavar="TIME",
        help="Without one, and without a byte either way, the connection counts as lost.",
        rich_help_panel=LINK,
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Let tcp:// leave this machine, in the clear.", rich_help_panel=_TRUST)
]
TlsCert = Annotated[
    str | None,
    typer.Option("--tls-cert", metavar="FILE", help="Of tls://; else amig/tls/cert.pem.", rich_help_panel=_TRUST),
]
TlsKey = Annotated[
    str | None, typer.Option("--tls-key", metavar="FILE", help="Its key; else key.pem.", rich_help_panel=_TRUST)
]
TlsCa = Annotated[
    str | None,
    typer.Option("--tls-ca", metavar="FILE", help="Whom to trust; else ca.pem there.", rich_help_panel=_TRUST),
]


class Engine(StrEnum):
    """What runs the guest."""

    KVM = "kvm"
    SIMULATOR = "simulator"


class Compression(StrEnum):
    """``--compression``."""

    NONE = "none"
    ZSTD = "zstd"
    AUTO = "auto"


class Verify(StrEnum):
    """``--verify``."""

    DIGESTS = "digests"
    FULL = "full"
    OFF = "off"


class OnTimeout(StrEnum):
    """``--on-timeout``."""

    CANCEL = "cancel"
    SWITCH = "switch"


def link(*, insecure: bool, cert: str | None, key: str | None, ca: str | None) -> LinkOptions:
    """Return how peers are reached; raises `UsageError` for what ``AMIG_SSH`` can't mean."""
    from amig.transport import LinkOptions, TlsFiles

    try:
        ssh = tuple(shlex.split(os.environ.get("AMIG_SSH", ""))) or ("ssh",)
    except ValueError as error:
        raise UsageError(f"AMIG_SSH is no command line: {error}") from None
    return LinkOptions(
        insecure=insecure,
        tls=TlsFiles(cert=cert, key=key, ca=ca),
        ssh=ssh,
        remote_amig=os.environ.get("AMIG_REMOTE_PATH") or "amig",
    )


def size(option: str, text: str) -> int:
    """Return the bytes that an option's value means; raises `UsageError` that names the option."""
    return _read(parse_size, option, text)


def rate(option: str, text: str) -> int | None:
    """Return bytes a second, None for unlimited; raises `UsageError` that names the option."""
    return _read(parse_rate, option, text)


def seconds(option: str, text: str) -> float:
    """Return seconds; raises `UsageError` that names the option."""
    return _read(parse_duration, option, text)


def ring_bytes(words: str) -> int:
    """Return the bytes of ``--dirty-ring``; raises `UsageError` for what no KVM takes."""
    found = int(words) * _ENTRY if words.isdecimal() and len(words) < 9 else size("--dirty-ring", words)
    if found & (found - 1) or not _MIN_RING <= found <= _MAX_RING:
        raise UsageError(
            f"--dirty-ring {words}: it takes a power of two, {_MIN_RING // _ENTRY} to {_MAX_RING // _ENTRY} entries "
            f"({format_size(_MIN_RING)} to {format_size(_MAX_RING)})"
        )
    return found


def _read(parse: Callable[[str], T], option: str, text: str) -> T:
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None
