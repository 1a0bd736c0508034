"""What a host says: replies to requests, and notices that nobody asked for."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from amig.control.types import (
    MAX_HELLO_FRAME,
    U64,
    GuestProgress,
    Id,
    Notice,
    Progress,
    Reply,
    Short,
    Text,
    WireMap,
)
from amig.guest import RunState
from amig.memory import MAX_REGIONS


class Ok(Reply, frozen=True, kw_only=True):
    """Done, and nothing to say."""


class Error(Reply, frozen=True, kw_only=True):
    """Refused or failed: ``code`` for programs, ``message`` for people."""

    code: Short
    message: Text


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


class LogCountersAre(Reply, frozen=True, kw_only=True):
    """`amig.dirty.hub.LogCounters`: since the guest came to this host, over all users; times are of ioctls only."""

    strategy: Short
    """Empty while nobody uses the log."""
    syncs: U64
    gets: U64
    get_ns: U64
    takes: U64
    pages_taken: U64
    clears: U64
    clear_ns: U64
    pages_cleared: U64
    pages_marked: U64
    pages_logged: U64
    ring_full: U64
    """How often a vCPU had to stop because its dirty ring was full."""


class VhostIsAttached(Reply, frozen=True, kw_only=True):
    """Descriptors come along: memory, one a region in the order of ``memory.regions``, then the shared log."""

    memory: WireMap
    log_bytes: U64
    running: bool
    """Whether this backend may write now; else it waits for ``vhost-run``."""


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


class GuestAsked(Reply, frozen=True, kw_only=True):
    """The guest will answer with this number."""

    number: U64


class CancelRequested(Notice, frozen=True, kw_only=True):
    """An operator wants the migration of this connection cancelled."""

    migration: Text


class VhostStop(Notice, frozen=True, kw_only=True):
    """The guest is being paused: write no more, log what was written, and say ``vhost-stopped`` with this number."""

    number: U64


class VhostRun(Notice, frozen=True, kw_only=True):
    """The guest runs: this backend may write."""


class ConsoleOutput(Notice, frozen=True, kw_only=True):
    """Bytes that the guest wrote to its serial port; ``dropped`` bytes before them went to nobody."""

    data: bytes
    dropped: U64 = 0


class GuestEnded(Notice, frozen=True, kw_only=True):
    """The guest will not run here again; the host is about to go."""

    state: RunState
    reason: Text = ""
