"""Live migration of real KVM guests, as an asyncio pipeline.

::

    import amig

    async with amig.Migration("web1", "tcp://hostb:7000", amig.Policy(downtime=0.05)) as migration:
        async for event in migration:
            print(event)
    result = await migration.result()

`Migration` moves a guest; `receive` waits for one and runs it, and so does `Reception`, step by step. `Guest` is the
seam that any virtual machine monitor can stand behind (docs/guest-protocol.md). Works in anybody's event loop,
asyncio's own or uvloop, more than one at a time. Errors are an `AmigError`; their tree stands in `amig.errors`.

The names below are loaded when they are first used: the command line starts before numpy would have been read.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from amig.session.release import RELEASE

if TYPE_CHECKING:
    from amig.errors import AmigError
    from amig.events import Event, Notice, PageCounts, Progress, Result, RoundEnded, State, StateChanged
    from amig.guest import Guest, GuestInfo, Incoming, RunState
    from amig.host.hosted import Ended, How
    from amig.host.service import HostService
    from amig.policy import Policy
    from amig.session.migration import Migration
    from amig.session.reception import Reception, receive
    from amig.transport.options import LinkOptions, TlsFiles
    from amig.transport.pairing import PairingHost

__version__ = RELEASE

__all__ = [
    "AmigError",
    "Ended",
    "Event",
    "Guest",
    "GuestInfo",
    "HostService",
    "How",
    "Incoming",
    "LinkOptions",
    "Migration",
    "Notice",
    "PageCounts",
    "PairingHost",
    "Policy",
    "Progress",
    "Reception",
    "Result",
    "RoundEnded",
    "RunState",
    "State",
    "StateChanged",
    "TlsFiles",
    "__version__",
    "receive",
]

_HOMES = {
    "AmigError": "amig.errors",
    "Ended": "amig.host.hosted",
    "Event": "amig.events",
    "Guest": "amig.guest",
    "GuestInfo": "amig.guest",
    "HostService": "amig.host.service",
    "How": "amig.host.hosted",
    "Incoming": "amig.guest",
    "LinkOptions": "amig.transport.options",
    "Migration": "amig.session.migration",
    "Notice": "amig.events",
    "PageCounts": "amig.events",
    "PairingHost": "amig.transport.pairing",
    "Policy": "amig.policy",
    "Progress": "amig.events",
    "Reception": "amig.session.reception",
    "Result": "amig.events",
    "RoundEnded": "amig.events",
    "RunState": "amig.guest",
    "State": "amig.events",
    "StateChanged": "amig.events",
    "TlsFiles": "amig.transport.options",
    "receive": "amig.session.reception",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
