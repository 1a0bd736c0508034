"""The guest protocol's messages: typed, validated, and the same in docs/guest-protocol.md.

A frame is a little-endian u32 length and that many bytes of msgpack: a map whose ``type`` names the message. Requests
carry an ``id`` that the reply repeats; notifications carry none. Unknown types and unknown fields are refused, so that
a new field needs a feature name that ``hello`` can require.
"""

from __future__ import annotations

import msgspec

from amig.control import replies as rp
from amig.control import requests as rq
from amig.control import types
from amig.control.types import Progress as Progress
from amig.errors import ControlError
from amig.guest import GuestInfo, Handover

AnyRequest = (
    rq.Hello
    | rq.LogStart
    | rq.Sync
    | rq.GiveBack
    | rq.LogCounters
    | rq.LogStop
    | rq.Pause
    | rq.Resume
    | rq.Save
    | rq.Prepare
    | rq.Commit
    | rq.Release
    | rq.MigrationBegin
    | rq.MigrationProgress
    | rq.MigrationEnd
    | rq.Leave
    | rq.Status
    | rq.Cancel
    | rq.OperatorPause
    | rq.OperatorResume
    | rq.Stop
    | rq.GuestAsk
    | rq.ConsoleAttach
    | rq.ConsoleInput
    | rq.ConsoleDetach
    | rq.VhostAttach
    | rq.VhostStopped
    | rq.VhostDetach
)
AnyFromHost = (
    rp.Ok
    | rp.Error
    | rp.HelloOk
    | rp.LogIsOn
    | rp.LogCountersAre
    | rp.Saved
    | rp.StatusIs
    | rp.GuestAsked
    | rp.CancelRequested
    | rp.ConsoleOutput
    | rp.GuestEnded
    | rp.VhostIsAttached
    | rp.VhostStop
    | rp.VhostRun
)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
_from_host: msgspec.msgpack.Decoder[AnyFromHost] = msgspec.msgpack.Decoder(AnyFromHost)


def encode(message: types.Message) -> bytes:
    """Return the message as msgpack, without its length."""
    return _encoder.encode(message)


def decode_request(payload: bytes | bytearray | memoryview) -> AnyRequest:
    """Return a validated request; raises `ControlError` with code ``malformed``."""
    try:
        return _requests.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ControlError(f"a malformed request: {error}", code="malformed") from None


def decode_from_host(payload: bytes | bytearray | memoryview) -> AnyFromHost:
    """Return a validated reply or notice; raises `ControlError` with code ``malformed``."""
    try:
        return _from_host.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ControlError(f"the host sent a malformed message: {error}", code="malformed") from None


def hello_ok(info: GuestInfo, *, request: int, pid: int, descriptors: int) -> rp.HelloOk:
    """Describe a guest for the wire."""
    return rp.HelloOk(
        id=request,
        version=types.VERSION,
        features=tuple(sorted(types.FEATURES)),
        name=info.name,
        pid=pid,
        engine=info.engine,
        vcpus=info.vcpus,
        state=info.state,
        memory=types.WireMap.of(info.memory),
        machine=info.machine,
        strategies=info.strategies,
        descriptors=descriptors,
    )


def guest_info(hello: rp.HelloOk) -> GuestInfo:
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


def handover(request: rq.Prepare) -> Handover:
    """Translate back."""
    return Handover(migration=request.migration, destination=request.destination, peer=request.peer)
