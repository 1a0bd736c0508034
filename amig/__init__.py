"""Live migration of real KVM guests, as an asyncio pipeline.

::

    import amig

    async with amig.Migration("web1", "tcp://hostb:7000", amig.Policy(downtime=0.05)) as migration:
        async for event in migration:
            print(event)
    result = await migration.result()

`Migration` moves a guest, `Reception` waits for one and runs it, `Guest` is the seam that any virtual machine monitor
can stand behind (docs/guest-protocol.md). Works in anybody's event loop, asyncio's own or uvloop, more than one at a
time. Errors are an `AmigError`; their tree stands in `amig.errors`.
"""

from amig.errors import AmigError
from amig.events import Event, Notice, PageCounts, Progress, Result, RoundEnded, State, StateChanged
from amig.guest import Guest, GuestInfo, Incoming, RunState
from amig.host.hosted import Ended, How
from amig.host.service import HostService
from amig.policy import Policy
from amig.session.migration import Migration
from amig.session.reception import Reception
from amig.session.release import RELEASE

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
    "Migration",
    "Notice",
    "PageCounts",
    "Policy",
    "Progress",
    "Reception",
    "Result",
    "RoundEnded",
    "RunState",
    "State",
    "StateChanged",
    "__version__",
]
