"""Durable handover records: whatever a file holds, it is a record or refused, and in doubt nothing boots."""

from __future__ import annotations

import contextlib
import random
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import xxhash

from amig.errors import AmigError, HostError
from amig.guest import Handover, Outcome
from amig.host import record
from amig.host.handover import Records
from amig.host.record import SLOT, Record, RecordState

from .target import SCRATCH, Mutate, Target

ID = "0123456789abcdef" * 2
_HEAD = struct.Struct("<8sIIQQ")


def run(data: bytes) -> None:
    said = [found for found in (record.decode_slot(data[:SLOT]), record.decode_slot(data[SLOT : 2 * SLOT])) if found]
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        records = Records(Path(folder))
        records.root.mkdir()
        records.source_path("web1").write_bytes(data)
        records.destination_path(ID).write_bytes(data)
        with contextlib.suppress(AmigError):
            assert records.outcome(ID) in (None, *Outcome)
        try:
            records.check_may_boot("web1")
        except AmigError:
            return
        newest = max(said, key=lambda one: one[0])[1] if said else None
        assert newest is None or newest.state is not RecordState.COMMITTED, "a guest in doubt may boot"
        try:
            records.prepare("web1", Handover(migration=ID, destination="tcp://b:1", peer="b")).close()
        except HostError:
            return
        found = records.source("web1")
        assert found is not None
        assert found.state is RecordState.PREPARED


def mend(data: bytes) -> bytes:
    """Put lengths and checksums of both slots right."""
    fixed = bytearray(data)
    for at in (0, SLOT):
        if len(fixed) < at + SLOT:
            break
        magic, version, length, sequence, _ = _HEAD.unpack_from(fixed, at)
        length = min(length, SLOT - _HEAD.size)
        body = bytes(fixed[at + _HEAD.size : at + _HEAD.size + length])
        total = xxhash.xxh3_64_intdigest(struct.pack("<QQ", length, sequence) + body)
        _HEAD.pack_into(fixed, at, magic, version, length, sequence, total)
    return bytes(fixed)


def mutate(data: bytes, most: int, seed: int, by: Mutate) -> bytes:
    """Change a body or the file as it is; most of the time the checksums stay right."""
    rng = random.Random(seed)
    if rng.randrange(8) == 0:
        return by(data, most)
    if rng.randrange(4) and len(data) >= 2 * SLOT:
        at = rng.choice((0, SLOT))
        (length,) = struct.unpack_from("<I", data, at + 12)
        body = by(data[at + _HEAD.size : at + _HEAD.size + min(length, SLOT - _HEAD.size)], SLOT - _HEAD.size)
        head = data[at : at + 12] + struct.pack("<I", len(body)) + data[at + 16 : at + _HEAD.size]
        return mend(data[:at] + (head + body).ljust(SLOT, b"\0") + data[at + SLOT :])
    return mend(by(data, most))


def seeds() -> Iterator[tuple[str, bytes]]:
    for number, state in enumerate(RecordState):
        one = Record(state=state, guest="web1", migration=ID, destination="tcp://hostb:7000", peer="hostb/web1")
        yield state.value, record.encode_slot(one, 2 * number) + bytes(SLOT)
    two = Record(state=RecordState.COMMITTED, guest="web1", migration=ID)
    yield "both", record.encode_slot(two, 2) + record.encode_slot(msgspec.structs.replace(two, written=1.5), 3)
    yield "nothing", bytes(2 * SLOT)


TARGET = Target(name="records", run=run, seeds=seeds, most=2 * SLOT + 64, memory=2 << 20, mutate=mutate)
