"""The control messages: msgpack maps with these fields, no others, every text and list bounded.

`encode` and `decode` are the only ways in and out. Reasons and identities are cleaned of control characters on both
ways, because they end up on a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from msgspec import Meta

from amig.digest import KEY_BYTES
from amig.errors import PeerError, UsageError
from amig.memory import MemoryMap
from amig.wire import limits
from amig.wire.frames import PAYLOAD_SIZES
from amig.wire.frametype import FrameType

if TYPE_CHECKING:
    from typing_extensions import Buffer

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A number of things, bytes or nanoseconds."""
Name = Annotated[str, Meta(min_length=1, max_length=limits.MAX_NAME, pattern=r"^[!-~]+\Z")]
"""Printable ASCII without spaces."""
DIGESTS_FEATURE: Final = "digests"
"""Feature: HELLO has a key, END the roots of all page digests, and the destination compares them."""
FULL_FEATURE: Final = "digests-full"
"""Feature: DIGESTS of all pages come before END, and the destination compares them with its memory."""
RESUME_FEATURE: Final = "resume"
"""Feature: when the connection is lost both sides keep what they have, and the source comes back with RESUME."""

BUSY: Final = "busy"
"""Code of a REFUSE that holds only for now: something else is arriving, or being tidied up."""
VERIFY_FAILED: Final = "verify"
"""Code of an ABORT whose reason is that what arrived is not what was sent."""

MigrationId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
"""32 hex digits, made by the source for one migration."""
Text = Annotated[str, Meta(max_length=limits.MAX_TEXT)]
"""What a person reads; holds no control characters."""
Names = Annotated[tuple[Name, ...], Meta(max_length=limits.MAX_FEATURES)]
RoundNumber = Annotated[int, Meta(ge=0, le=limits.MAX_ROUND)]
Digest = Annotated[bytes, Meta(max_length=limits.MAX_DIGEST)]
DigestKey = Annotated[bytes, Meta(max_length=KEY_BYTES)]
Roots = Annotated[bytes, Meta(max_length=limits.MAX_ROOT_BYTES)]
Token = Annotated[bytes, Meta(min_length=16, max_length=limits.MAX_TOKEN)]
HeldBits = Annotated[bytes, Meta(min_length=8, max_length=limits.MAX_HELD_BYTES)]


def plain(text: str) -> str:
    """Return ``text`` without control characters, cut to what a message may hold."""
    cleaned = "".join(c if c.isprintable() else " " for c in text[: limits.MAX_TEXT])
    return cleaned.encode("utf-8", "replace").decode()


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A control message; its class says its frame type."""


class Hello(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the guest is, and what the source would like."""

    migration: MigrationId
    name: Name
    engine: Name
    vcpus: Annotated[int, Meta(ge=1, le=limits.MAX_VCPUS)]
    memory: MemoryMap
    machine: Annotated[bytes, Meta(max_length=limits.MAX_MACHINE)]
    version: Annotated[int, Meta(ge=0, le=2**31 - 1)] = limits.VERSION
    amig: Name = "0"
    """Release of the source; for people, never to decide by."""
    features_required: Names = ()
    features_optional: Names = ()
    streams: Annotated[int, Meta(ge=1, le=limits.MAX_STREAMS)] = 1
    compression: Literal["none", "zstd", "auto"] = "none"
    clock: Literal["advance", "freeze"] = "advance"
    """Whether the guest's clock counts the time that it was stopped."""
    digest_key: DigestKey = b""
    """Key of all page digests, 8 bytes, with the feature `DIGESTS_FEATURE`; else empty."""
    memory_used: Count = 0
    """Bytes of ``memory`` that held something when the source asked; 0 when it does not know."""


class Welcome(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Agreed: the destination has built the machine and waits for its memory."""

    migration: MigrationId
    name: Name
    """Of the guest at the destination."""
    identity: Text
    """Who the destination says it is; goes into the source's handover record."""
    token: Token
    """One-time secret that every further connection of this migration shows."""
    features: Names = ()
    """In use from now on: all required ones, and the optional ones that the destination knows."""
    streams: Annotated[int, Meta(ge=1, le=limits.MAX_STREAMS)] = 1
    """Connections in all that the destination waits for; at most as many as asked for."""
    amig: Name = "0"

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "identity", plain(self.identity))


class Refuse(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No, and why."""

    code: Name
    reason: Text

    def __post_init__(self) -> None:
        _clean(self)


class Join(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A further connection of a migration."""

    migration: MigrationId
    token: Token
    stream: Annotated[int, Meta(ge=1, lt=limits.MAX_STREAMS)]


class Joined(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer to `Join`."""

    stream: Annotated[int, Meta(ge=1, lt=limits.MAX_STREAMS)]


class Round(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No more pages of this round will come on this connection."""

    round: RoundNumber
    pages: Count
    """Pages of the round that this connection carried, zero pages included."""


class Placed(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every page of the round, from all connections, is in guest memory."""

    round: RoundNumber


class End(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything has been sent; the counts and digests are over all connections."""

    rounds: Annotated[int, Meta(ge=0, le=limits.MAX_ROUND + 1)]
    """The last round's number plus one."""
    pages: Count
    """Pages sent with data since WELCOME or the last RESUMED, those sent again counted again."""
    zero_pages: Count
    state_bytes: Annotated[int, Meta(ge=0, le=limits.MAX_STATE)]
    state_digest: Digest
    """BLAKE2b-256 of the whole state; empty when there is none."""
    memory_roots: Roots = b""
    """Roots of the digests of all pages as last sent, with the feature `DIGESTS_FEATURE`; else empty."""


class Digests(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Digests of consecutive pages, hashed while the guest is paused; all pages, in order, one message each range."""

    region: Annotated[int, Meta(ge=0, le=limits.MAX_REGION_ID)]
    first: Count
    digests: Annotated[bytes, Meta(min_length=8, max_length=8 * limits.MAX_PAGE_DIGESTS)]
    """8 bytes a page."""


class Prepared(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The destination has everything, has verified and loaded it, and could run."""

    migration: MigrationId
    load_ns: Count = 0
    """What verifying and loading took, for the source's estimate of downtime."""


class Commit(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The source has durably given the guest away."""

    migration: MigrationId


class Running(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The destination has durably taken the guest over."""

    migration: MigrationId
    start_ns: Count = 0
    """From COMMIT's arrival to the guest's start, as the destination measured it."""


class Discarded(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The destination has durably let go of the guest and will never run it."""

    migration: MigrationId
    reason: Text

    def __post_init__(self) -> None:
        _clean(self)


class Abort(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The migration is off."""

    code: Name
    reason: Text

    def __post_init__(self) -> None:
        _clean(self)


class Ping(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answer at once with the same numbers."""

    seq: Count
    sent_ns: Count
    """The sender's own clock."""


class Pong(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer to `Ping`."""

    seq: Count
    sent_ns: Count


class Query(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of this migration? Answered with RUNNING, DISCARDED or REFUSE."""

    migration: MigrationId


class Resume(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The connection was lost; this is the source again. Only with the feature `RESUME_FEATURE`."""

    migration: MigrationId
    token: Token
    """WELCOME's, on every return."""
    since: RoundNumber
    """The round with which the source began after the last RESUMED that has reached it; 0 if none has."""
    round: RoundNumber
    """The round with which it will go on; a number that it has not used yet."""


class Held(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pages in place of the round that was under way; one message for each range that has some, in order."""

    region: Annotated[int, Meta(ge=0, le=limits.MAX_REGION_ID)]
    first: Count
    """Page of bit 0; a multiple of 64."""
    pages: HeldBits
    """Little-endian 64-bit words, one bit a page."""


class Resumed(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every page of the rounds before ``rounds`` is in guest memory, and those of round ``rounds`` that HELD named.

    Nothing else that was sent is; what comes now begins with the round that RESUME said.
    """

    migration: MigrationId
    rounds: RoundNumber
    token: Token
    """What the further connections of this return show, instead of WELCOME's."""


_TYPES: Final[Mapping[type[Message], FrameType]] = {
    Hello: FrameType.HELLO,
    Welcome: FrameType.WELCOME,
    Refuse: FrameType.REFUSE,
    Join: FrameType.JOIN,
    Joined: FrameType.JOINED,
    Round: FrameType.ROUND,
    Placed: FrameType.PLACED,
    End: FrameType.END,
    Digests: FrameType.DIGESTS,
    Prepared: FrameType.PREPARED,
    Commit: FrameType.COMMIT,
    Running: FrameType.RUNNING,
    Discarded: FrameType.DISCARDED,
    Abort: FrameType.ABORT,
    Ping: FrameType.PING,
    Pong: FrameType.PONG,
    Query: FrameType.QUERY,
    Resume: FrameType.RESUME,
    Held: FrameType.HELD,
    Resumed: FrameType.RESUMED,
}
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODERS: Final = {kind: msgspec.msgpack.Decoder(cls) for cls, kind in _TYPES.items()}


class _Version(msgspec.Struct):
    """HELLO of any version, as far as every version agrees."""

    version: int


_VERSION_DECODER: Final = msgspec.msgpack.Decoder(_Version)


def frame_type(message: Message) -> FrameType:
    """Return the frame type of a message."""
    return _TYPES[type(message)]


def encode(message: Message) -> bytes:
    """Return the payload of a message; raises `ValueError` when a peer would not take it: our own bug."""
    payload = _ENCODER.encode(message)
    kind = _TYPES[type(message)]
    low, high = PAYLOAD_SIZES[kind]
    if not low <= len(payload) <= high:
        raise ValueError(f"a {kind.name} message of {len(payload)} bytes (at most {high})")
    try:
        _decode(kind, payload)
    except (msgspec.MsgspecError, UsageError) as err:
        raise ValueError(f"a {kind.name} message that no peer would take: {err}") from err
    return payload


def decode(kind: FrameType, payload: Buffer) -> Message:
    """Return the message in the payload of a control frame; raises `PeerError` for anything malformed.

    A HELLO of another version raises `Mismatch`, so that the destination can name both versions in its REFUSE.
    """
    try:
        return _decode(kind, payload)
    except (msgspec.MsgspecError, UsageError, ValueError, RecursionError) as err:
        raise PeerError(f"the peer sent a malformed {kind.name} message: {plain(str(err))}") from err


class Mismatch(PeerError):
    """The peer speaks another version of the protocol."""

    def __init__(self, theirs: int) -> None:
        super().__init__(
            f"the peer speaks version {theirs} of the migration protocol, this side version {limits.VERSION}: "
            "use releases of amig on both sides that share one"
        )
        self.theirs = theirs


def agree(hello: Hello, known: Iterable[str]) -> tuple[str, ...]:
    """Return the features to use; raises `PeerError` naming required ones that are not ``known``."""
    ours = frozenset(known)
    missing = [f for f in hello.features_required if f not in ours]
    if missing:
        raise PeerError(f"the source requires {', '.join(missing)}, which this side does not know: upgrade it")
    wanted = dict.fromkeys((*hello.features_required, *hello.features_optional))
    return tuple(f for f in wanted if f in ours)[: limits.MAX_FEATURES]


def _decode(kind: FrameType, payload: Buffer) -> Message:
    if kind is FrameType.HELLO and (theirs := _VERSION_DECODER.decode(payload).version) != limits.VERSION:
        raise Mismatch(theirs)
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise PeerError(f"{kind.name} is not a control message")
    message: Message = decoder.decode(payload)
    if isinstance(message, Hello):
        message.memory.check()
    return message


def _clean(message: Refuse | Abort | Discarded) -> None:
    msgspec.structs.force_setattr(message, "reason", plain(message.reason))
