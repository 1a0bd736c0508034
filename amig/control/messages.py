"""The guest protocol's messages: typed, validated, and the same in docs/guest-protocol.md.

A frame is a little-endian u32 length and that many bytes of msgpack: a map whose ``type`` names the message. Requests
carry an ``id`` that the reply repeats; notifications carry none. Unknown types and unknown fields are refused, so that
a new field needs a feature name that ``hello`` can require.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from amig.errors import ControlError
from amig.guest import GuestInfo, Handover, Outcome, RunState
from amig.memory import MAX_REGIONS, MAX_SLOTS, MemoryMap, Region, Slot

VERSION = 1
FEATURES = frozenset({"take-socket", "migration-registry", "console"})
"""What this version of the protocol can do beyond its fixed part; a client may require any of them by name."""

MAX_FRAME = 64 << 10
"""Bytes of any frame but those below."""
MAX_HELLO_FRAME = 1 << 20
"""A memory map of 512 slots and the machine's description."""
MAX_SAVE_FRAME = 32 << 20
"""Device and vCPU state."""
MAX_GIVE_BACK_WORDS = 6 << 10
"""Bitmap words in one ``give-back``; more go in several."""
MAX_CONSOLE_BYTES = 16 << 10

Id = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U64 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Short = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=4096)]
MigrationId = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]


def _kebab(name: str) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


class Message(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag=_kebab,
):
    """Anything that travels over the control socket."""


class Request(Message, frozen=True, kw_only=True):
    """Asks the host for something; answered by exactly one reply of the same ``id``, or by none if that is 0."""

    id: Id = 0


class Reply(Message, frozen=True, kw_only=True):
    """Answers the request of that ``id``."""

    id: Id = 0


class Notice(Message, frozen=True, kw_only=True):
    """Sent by the host unasked."""


# --- requests --------------------------------------------------------------------------------------------------------


class Hello(Request, frozen=True, kw_only=True):
    """First on every connection. ``want_memory`` asks for the regions' descriptors, read-only."""

    version: Annotated[int, Meta(ge=0, le=2**31)]
    require: Annotated[tuple[Short, ...], Meta(max_length=64)] = ()
    want_memory: bool = False
    client: Short = ""


class LogStart(Request, frozen=True, kw_only=True):
    """Become a user of the dirty log; the reply brings the shared bitmaps and the take socket."""

    strategy: Short | None = None


class Sync(Request, frozen=True, kw_only=True):
    """Bring this user's ``pending`` bitmap up to date."""


class GiveBack(Request, frozen=True, kw_only=True):
    """Return taken bits that were not delivered: ``words`` are little-endian u64, from page ``first`` on."""

    region: Id
    first: U64
    words: Annotated[bytes, Meta(max_length=8 * MAX_GIVE_BACK_WORDS)]


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


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A migrator's own figures, for others to look at; the host only keeps the last. See `amig.events.Progress`."""

    state: Short = ""
    round: U64 = 0
    fraction: float = 0.0
    remaining_pages: U64 = 0
    bytes_sent: U64 = 0
    bytes_per_s: float = 0.0
    dirty_bytes_per_s: float = 0.0
    eta_s: float | None = None
    waiting_for: Short = ""


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


class ConsoleAttach(Request, frozen=True, kw_only=True):
    """Begin to receive ``console-output``; ``replay`` brings what the host still remembers first."""

    replay: bool = True


class ConsoleInput(Request, frozen=True, kw_only=True):
    """Feed the guest's serial port."""

    data: Annotated[bytes, Meta(max_length=MAX_CONSOLE_BYTES)]


class ConsoleDetach(Request, frozen=True, kw_only=True):
    """No more ``console-output``."""


# --- replies ---------------------------------------------------------------------------------------------------------


class Ok(Reply, frozen=True, kw_only=True):
    """Done, and nothing to say."""


class Error(Reply, frozen=True, kw_only=True):
    """Refused or failed: ``code`` for programs, ``message`` for people."""

    code: Short
    message: Text


class WireRegion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`amig.memory.Region`."""

    id: Id
    size: U64


class WireSlot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`amig.memory.Slot`."""

    index: Id
    guest_phys: U64
    size: U64
    region: Id
    offset: U64


class WireMap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`amig.memory.MemoryMap`."""

    generation: U64
    regions: Annotated[tuple[WireRegion, ...], Meta(max_length=MAX_REGIONS)]
    slots: Annotated[tuple[WireSlot, ...], Meta(max_length=MAX_SLOTS)]

    @classmethod
    def of(cls, memory: MemoryMap) -> WireMap:
        """Translate for the wire."""
        return cls(
            generation=memory.generation,
            regions=tuple(WireRegion(id=r.id, size=r.size) for r in memory.regions),
            slots=tuple(
                WireSlot(index=s.index, guest_phys=s.guest_phys, size=s.size, region=s.region, offset=s.offset)
                for s in memory.slots
            ),
        )

    def memory_map(self) -> MemoryMap:
        """Translate back, checked; raises `UsageError`."""
        memory = MemoryMap(
            generation=self.generation,
            regions=tuple(Region(id=r.id, size=r.size) for r in self.regions),
            slots=tuple(
                Slot(index=s.index, guest_phys=s.guest_phys, size=s.size, region=s.region, offset=s.offset)
                for s in self.slots
            ),
        )
        memory.check()
        return memory


class HelloOk(Reply, frozen=True, kw_only=True):
    """Who this host is. With ``want_memory`` one descriptor a region comes along, in the order of ``regions``."""

    version: int
    features: Annotated[tuple[Short, ...], Meta(max_length=64)]
    name: Short
    pid: U64
    engine: Short
    vcpus: Id
    state: RunState
    memory: WireMap | None = None
    machine: Annotated[bytes, Meta(max_length=MAX_HELLO_FRAME // 2)] = b""
    strategies: Annotated[tuple[Short, ...], Meta(max_length=64)] = ()
    descriptors: Annotated[int, Meta(ge=0, le=MAX_REGIONS)] = 0


class BitmapPlace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a region's two bitmaps lie in the shared file: byte offsets, length in words."""

    region: Id
    words: U64
    pending: U64
    taken: U64


class LogIsOn(Reply, frozen=True, kw_only=True):
    """`amig.guest.LogStarted`. Two descriptors come along: the shared bitmaps, then the take socket."""

    strategy: Short
    initially_set: bool
    generation: U64
    bitmaps: Annotated[tuple[BitmapPlace, ...], Meta(max_length=MAX_REGIONS)]


class Saved(Reply, frozen=True, kw_only=True):
    """Device and vCPU state."""

    state: bytes


class MigrationStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A migration that a migrator registered, under way or ended (``running``, ``completed``, ...)."""

    migration: Text
    destination: Text
    status: Short
    error: Text = ""
    seconds: float = 0.0
    cancel_requested: bool = False
    progress: Progress = msgspec.field(default_factory=Progress)


class HandoverStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A committed handover whose end this host has not been told."""

    migration: Text
    destination: Text
    peer: Text


class GuestProgress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What our own guest image counts in its memory; absent for any other guest."""

    heartbeat: U64 = 0
    progress: U64 = 0
    workload: Short = ""
    verdict: Short = ""


class StatusIs(Reply, frozen=True, kw_only=True):
    """What `amig status` shows."""

    name: Short
    pid: U64
    engine: Short
    state: RunState
    reason: Text = ""
    operator_paused: bool = False
    vcpus: Id = 0
    memory_bytes: U64 = 0
    uptime_s: float = 0.0
    log_strategy: Short = ""
    log_users: Annotated[tuple[Short, ...], Meta(max_length=256)] = ()
    consoles: Id = 0
    migration: MigrationStatus | None = None
    last_migration: MigrationStatus | None = None
    in_doubt: HandoverStatus | None = None
    guest: GuestProgress | None = None


# --- notices ---------------------------------------------------------------------------------------------------------


class CancelRequested(Notice, frozen=True, kw_only=True):
    """An operator wants the migration of this connection cancelled."""

    migration: Text


class ConsoleOutput(Notice, frozen=True, kw_only=True):
    """Bytes that the guest wrote to its serial port; ``dropped`` bytes before them went to nobody."""

    data: bytes
    dropped: U64 = 0


class GuestEnded(Notice, frozen=True, kw_only=True):
    """The guest will not run here again; the host is about to go."""

    state: RunState
    reason: Text = ""


AnyRequest = (
    Hello
    | LogStart
    | Sync
    | GiveBack
    | LogStop
    | Pause
    | Resume
    | Save
    | Prepare
    | Commit
    | Release
    | MigrationBegin
    | MigrationProgress
    | MigrationEnd
    | Leave
    | Status
    | Cancel
    | OperatorPause
    | OperatorResume
    | Stop
    | ConsoleAttach
    | ConsoleInput
    | ConsoleDetach
)
AnyFromHost = Ok | Error | HelloOk | LogIsOn | Saved | StatusIs | CancelRequested | ConsoleOutput | GuestEnded

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
_from_host: msgspec.msgpack.Decoder[AnyFromHost] = msgspec.msgpack.Decoder(AnyFromHost)


def encode(message: Message) -> bytes:
    """Return the message as msgpack, without its length."""
    return _encoder.encode(message)


def decode_request(payload: bytes | bytearray | memoryview) -> AnyRequest:
    """Return a validated request; raises `ControlError` with code ``malformed``."""
    try:
        return _requests.decode(payload)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise ControlError(f"a malformed request: {error}", code="malformed") from None
    except (RecursionError, UnicodeDecodeError):
        raise ControlError("a malformed request", code="malformed") from None


def decode_from_host(payload: bytes | bytearray | memoryview) -> AnyFromHost:
    """Return a validated reply or notice; raises `ControlError` with code ``malformed``."""
    try:
        return _from_host.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ControlError(f"the host sent a malformed message: {error}", code="malformed") from None


def hello_ok(info: GuestInfo, *, request: int, pid: int, descriptors: int) -> HelloOk:
    """Describe a guest for the wire."""
    return HelloOk(
        id=request,
        version=VERSION,
        features=tuple(sorted(FEATURES)),
        name=info.name,
        pid=pid,
        engine=info.engine,
        vcpus=info.vcpus,
        state=info.state,
        memory=WireMap.of(info.memory),
        machine=info.machine,
        strategies=info.strategies,
        descriptors=descriptors,
    )


def guest_info(hello: HelloOk) -> GuestInfo:
    """Translate back, checked; raises `ControlError` when this host has no guest yet."""
    if hello.memory is None:
        raise ControlError(f"{hello.name} is waiting for a guest: there is nothing to migrate", code="wrong-state")
    return GuestInfo(
        name=hello.name,
        engine=hello.engine,
        vcpus=hello.vcpus,
        memory=hello.memory.memory_map(),
        state=hello.state,
        machine=hello.machine,
        strategies=hello.strategies,
    )


def handover(request: Prepare) -> Handover:
    """Translate back."""
    return Handover(migration=request.migration, destination=request.destination, peer=request.peer)
