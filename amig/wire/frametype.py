"""The kinds of frame, by the number that stands in the frame header."""

from __future__ import annotations

import enum


class FrameType(enum.IntEnum):
    """What a frame is. Numbers are part of the protocol and are never used again for something else."""

    HELLO = 1
    """Source, stream 0: what the guest is and what the source needs."""
    WELCOME = 2
    """Destination: agreed; carries the token for further connections."""
    REFUSE = 3
    """Destination, in place of WELCOME or JOINED: no, and why."""
    JOIN = 4
    """Source, first frame of a further connection."""
    JOINED = 5
    """Destination: the further connection belongs to the migration."""
    BLOCK = 6
    """Source: pages."""
    ROUND = 7
    """Source, on every connection: no more pages of this round will come here."""
    PLACED = 8
    """Destination, stream 0: every page of the round is in guest memory."""
    STATE = 9
    """Source, stream 0: a part of the device and vCPU state."""
    END = 10
    """Source, stream 0: everything has been sent."""
    PREPARED = 11
    """Destination: has everything, has verified and loaded it, and could run."""
    COMMIT = 12
    """Source: has durably given the guest away."""
    RUNNING = 13
    """Destination: has durably taken the guest over."""
    DISCARDED = 14
    """Destination: has durably let go of the guest and will never run it."""
    ABORT = 15
    """Either side, before COMMIT: the migration is off, and why."""
    PING = 16
    """Either side: answer at once."""
    PONG = 17
    """The answer to PING."""
    QUERY = 18
    """Source, on a connection of its own after a lost one: what became of that migration?"""
    DIGESTS = 22
    """Source, stream 0: digests of all pages, when memory is hashed again on both sides."""
    RESUME = 23
    """Source, first frame of a connection after a lost one: the migration goes on here."""
    RESUMED = 24
    """Destination: agreed; all rounds before this one are in place, and what HELD named of it."""
    HELD = 25
    """Destination, before RESUMED: pages that are in place of the round that was under way."""
