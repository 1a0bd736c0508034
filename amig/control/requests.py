"""What a client may ask of a host; docs/guest-protocol.md says what each request needs and does."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from amig.control.types import (
    MAX_CONSOLE_BYTES,
    MAX_GIVE_BACK_WORDS,
    U64,
    Id,
    MigrationId,
    Progress,
    Request,
    Short,
    Text,
)
from amig.guest import Outcome

GuestWord = Literal["verify", "gap-reset"]


class Hello(Request, frozen=True, kw_only=True):
    """First on every connection. ``want_memory`` asks for the regions' descriptors, read-only."""

    version: Annotated[int, Meta(ge=0, le=2**31)]
    require: Annotated[tuple[Short, ...], Meta(max_length=64)] = ()
    want_memory: bool = False
    client: Short = ""


class LogStart(Request, frozen=True, kw_only=True):
    """Become a user of the dirty log; the reply brings the shared bitmaps and the take socket."""

    strategy: Short | None = None
    unsafe: bool = False
    """Allow a strategy that is known to lose pages."""
    apart: bool = False
    """Count pages that are only possibly dirty apart; see the reply of a take."""


class Sync(Request, frozen=True, kw_only=True):
    """Bring this user's ``pending`` bitmap up to date."""


class GiveBack(Request, frozen=True, kw_only=True):
    """Return taken bits that were not delivered: ``words`` are little-endian u64, from page ``first`` on."""

    region: Id
    first: U64
    words: Annotated[bytes, Meta(max_length=8 * MAX_GIVE_BACK_WORDS)]


class LogCounters(Request, frozen=True, kw_only=True):
    """What the host's dirty log has done and cost so far; any connection may ask."""


class LogStop(Request, frozen=True, kw_only=True):
    """Leave the dirty log."""


class Pause(Request, frozen=True, kw_only=True):
    """Stop the vCPUs for the last pages of a migration; undone when this connection ends."""


class Resume(Request, frozen=True, kw_only=True):
    """Undo ``pause``."""


class Save(Request, frozen=True, kw_only=True):
    """Device and vCPU state of the paused guest."""


class Prepare(Request, frozen=True, kw_only=True):
    """Preallocate the durable record of a handover."""

    migration: MigrationId
    destination: Annotated[str, Meta(max_length=1024)]
    peer: Annotated[str, Meta(max_length=1024)]


class Commit(Request, frozen=True, kw_only=True):
    """Make the handover durable; the guest does not run here from the reply on."""

    migration: MigrationId


class Release(Request, frozen=True, kw_only=True):
    """How a committed handover ended; any connection may say it."""

    migration: MigrationId
    outcome: Outcome


class MigrationBegin(Request, frozen=True, kw_only=True):
    """Claim the guest for one migration; the connection is told when an operator cancels it."""

    migration: MigrationId
    destination: Annotated[str, Meta(max_length=1024)]


class MigrationProgress(Request, frozen=True, kw_only=True):
    """Replace the figures that ``status`` shows."""

    progress: Progress


class MigrationEnd(Request, frozen=True, kw_only=True):
    """How it ended, as `amig status` will show it: ``completed``, ``cancelled`` or ``failed``."""

    status: Short
    error: Text = ""


class Leave(Request, frozen=True, kw_only=True):
    """Undo what this connection did, as its end would; the reply comes when that is done."""


class Status(Request, frozen=True, kw_only=True):
    """Everything there is to know of this host."""


class Cancel(Request, frozen=True, kw_only=True):
    """Ask the running migration to stop; its connection gets ``cancel-requested``."""


class OperatorPause(Request, frozen=True, kw_only=True):
    """Pause the guest until an operator resumes it; survives the connection."""


class OperatorResume(Request, frozen=True, kw_only=True):
    """Undo ``operator-pause``."""


class Stop(Request, frozen=True, kw_only=True):
    """Stop the guest and its host. Refused while a handover is in doubt, unless ``force``."""

    force: bool = False


class GuestAsk(Request, frozen=True, kw_only=True):
    """Ask amig's own guest image: ``verify`` its memory, or forget its longest gap; ``status`` tells when it has."""

    what: GuestWord


class ConsoleAttach(Request, frozen=True, kw_only=True):
    """Begin to receive ``console-output``; ``replay`` brings what the host still remembers first."""

    replay: bool = True


class ConsoleInput(Request, frozen=True, kw_only=True):
    """Feed the guest's serial port."""

    data: Annotated[bytes, Meta(max_length=MAX_CONSOLE_BYTES)]


class ConsoleDetach(Request, frozen=True, kw_only=True):
    """No more ``console-output``."""


class VhostAttach(Request, frozen=True, kw_only=True):
    """Become a device backend: get guest memory, writable, and the log that all backends share."""


class VhostStopped(Request, frozen=True, kw_only=True):
    """The backend rests, its last write is logged; ``number`` is that of the ``vhost-stop``."""

    number: U64


class VhostDetach(Request, frozen=True, kw_only=True):
    """The backend has written and logged for the last time."""
