"""An address with a secret in it: read where nobody looks, hidden where everybody does."""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import sys

from amig.cli import say
from amig.errors import UsageError
from amig.transport.address import PairAddress, parse

MAX_ADDRESS = 4096


def read_destination(word: str) -> str:
    """Return DST of a command line, or what standard input says for ``-``. Raises `UsageError`.

    A secret that did come on the command line is overwritten there and warned of: it was to be seen for a moment.
    """
    if word != "-":
        if isinstance(parse(word), PairAddress):
            hide(word.partition("#")[2])
            say.warn(
                "the address has a secret in it, and command lines can be read by every user of this machine, and are "
                "kept by shells: write - in its place, and paste it when asked"
            )
        return word
    if sys.stdin.isatty():
        line = getpass.getpass("Address (is not shown): ", stream=sys.stderr)
    else:
        line = sys.stdin.readline(MAX_ADDRESS)
    if not line.strip():
        raise UsageError("- as DST reads the address from standard input, and there was none")
    parse(line.strip())
    return line.strip()


def hide(secret: str) -> None:
    """Overwrite ``secret`` in the memory that the kernel shows as our command line, as far as it is there."""
    # proc(5): arg_start and arg_end are fields 48 and 49 of stat; the second field may hold spaces and ends with ')'.
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        shown = ctypes.string_at(start, end - start)
        wanted = secret.encode()
        at = shown.find(wanted) if wanted else -1
        while at >= 0:
            ctypes.memset(start + at, ord("x"), len(wanted))
            at = shown.find(wanted, at + len(wanted))
