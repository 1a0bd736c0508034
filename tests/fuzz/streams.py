"""Streams of frames: joining, cutting, and changing them in a way that gets past length and checksum."""

from __future__ import annotations

import random
import struct

import xxhash

from amig.wire import frames, messages
from amig.wire.block import BlockFrame, encode_header
from amig.wire.frametype import FrameType
from amig.wire.state import digest, split

from .target import Mutate

_HEAD = struct.Struct("<IBBHQ")
_BLOCK_HEAD = frames.BLOCK_HEADER_SIZE


def message(message_: messages.Message) -> bytes:
    """Return a control frame."""
    return b"".join(frames.frame(messages.frame_type(message_), messages.encode(message_)))


def block(described: BlockFrame, data: bytes = b"", *, summed: bool = True) -> bytes:
    """Return a BLOCK frame."""
    payload = encode_header(described.header) + described.pages.tobytes() + described.zero.tobytes() + data
    return mend(_HEAD.pack(len(payload), FrameType.BLOCK, 0 if summed else frames.UNSUMMED_DATA, 0, 0) + payload)


def state(content: bytes) -> bytes:
    """Return the STATE frames of a device state."""
    return b"".join(b"".join(frames.frame(FrameType.STATE, head + part)) for head, part in split(content))


def end(rounds: int, pages: int, zero_pages: int, content: bytes, memory_roots: bytes = b"") -> bytes:
    """Return an END frame."""
    return message(
        messages.End(
            rounds=rounds,
            pages=pages,
            zero_pages=zero_pages,
            state_bytes=len(content),
            state_digest=digest(content),
            memory_roots=memory_roots,
        )
    )


def mend(frame: bytes, tag: int = 0) -> bytes:
    """Return a frame (after ``tag`` bytes of something else) with its length and checksum put right."""
    if len(frame) < tag + _HEAD.size:
        return frame
    _, kind, flags, reserved, _ = _HEAD.unpack_from(frame, tag)
    payload = frame[tag + _HEAD.size :]
    covered = payload
    if kind == FrameType.BLOCK and flags & frames.UNSUMMED_DATA and len(payload) >= _BLOCK_HEAD:
        (span,) = struct.unpack_from("<I", payload, 16)
        covered = payload[: _BLOCK_HEAD + 2 * 8 * (-(-span // 64))]
    seed = struct.pack("<IBBH", len(payload), kind, flags, reserved)
    total = xxhash.xxh3_64_intdigest(covered, int.from_bytes(seed, "little"))
    return frame[:tag] + seed + struct.pack("<Q", total) + payload


def cut(stream: bytes, tag: int = 0) -> list[bytes]:
    """Return the frames of a stream, each with the ``tag`` bytes before it; what is no whole frame comes last."""
    pieces = []
    at = 0
    while at + tag + _HEAD.size <= len(stream):
        stop = at + tag + _HEAD.size + _HEAD.unpack_from(stream, at + tag)[0]
        if stop > len(stream):
            break
        pieces.append(stream[at:stop])
        at = stop
    if at < len(stream):
        pieces.append(stream[at:])
    return pieces


def mutate(data: bytes, most: int, seed: int, by: Mutate, *, skip: int = 0, tag: int = 0) -> bytes:
    """Change a stream: a frame's content, or which frames come in which order; now and then any of its bytes."""
    rng = random.Random(seed)
    kind = rng.randrange(10)
    if kind == 0 or len(data) <= skip:
        return by(data, most)
    if kind == 1 and skip:
        return by(data[:skip], skip)[:skip].ljust(skip, b"\0") + data[skip:]
    pieces = cut(data[skip:], tag)
    at = rng.randrange(len(pieces))
    if kind == 2:
        del pieces[at]
    elif kind == 3:
        pieces.insert(rng.randrange(len(pieces) + 1), pieces[at])
    elif kind == 4:
        other = rng.randrange(len(pieces))
        pieces[at], pieces[other] = pieces[other], pieces[at]
    else:
        room = max(len(pieces[at]), most - len(data))
        pieces[at] = mend(by(pieces[at], room), tag)
    return (data[:skip] + b"".join(pieces))[:most]
