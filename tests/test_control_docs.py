"""docs/guest-protocol.md names everything that the messages have, and an outsider's client that follows it works."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path

import msgspec
import pytest

from amig.control import messages as m
from amig.control import replies as rp
from amig.control import types
from amig.control.server import MAX_CONNECTIONS
from amig.control.take import MAX_OUTSTANDING, REPLY, REQUEST

from .fakes import hosted_guest, serving

DOCS = Path(__file__).parent.parent / "docs" / "guest-protocol.md"


def structs() -> list[type[msgspec.Struct]]:
    nested: list[type[msgspec.Struct]] = [
        types.WireMap,
        types.WireRegion,
        types.WireSlot,
        types.Progress,
        types.GuestProgress,
        rp.BitmapPlace,
        rp.MigrationStatus,
        rp.HandoverStatus,
    ]
    return [*m.AnyRequest.__args__, *m.AnyFromHost.__args__, *nested]


@pytest.mark.parametrize("struct_", structs(), ids=lambda s: s.__name__)
def test_every_message_and_field_is_described(struct_: type[msgspec.Struct]) -> None:
    text = DOCS.read_text()
    tag = struct_.__struct_config__.tag
    if tag is not None:
        assert re.search(rf"`{tag}[ `]", text), f"no word about {tag}"
    for field in struct_.__struct_fields__:
        assert re.search(rf"\b{field}\b", text), f"{struct_.__name__}.{field} is missing"


def test_the_numbers_are_the_codes() -> None:
    text = DOCS.read_text()
    assert f"version {types.VERSION}" in text
    assert f"{types.MAX_FRAME} bytes" in text
    assert f"at most {MAX_CONNECTIONS}" in text
    assert f"at most {MAX_OUTSTANDING} may be outstanding" in text
    assert f"at most {types.MAX_GIVE_BACK_WORDS} a message" in text
    assert f"request, {REQUEST.size} bytes" in text
    assert f"reply,   {REPLY.size} bytes" in text
    for feature in types.FEATURES:
        assert f"`{feature}`" in text


OUTSIDER = r"""
import array, json, mmap, socket, struct, sys
import msgspec.msgpack as msgpack          # any msgpack will do; nothing of amig is used here

sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
last = 0

def read(count, fds):
    data = b""
    while len(data) < count:
        part, ancillary, _, _ = sock.recvmsg(count - len(data), socket.CMSG_SPACE(64 * 4))
        assert part, "the host hung up"
        for level, kind, raw in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            fds.frombytes(raw)
        data += part
    return data

def ask(type, **fields):
    global last
    last += 1
    payload = msgpack.encode({"type": type, "id": last, **fields})
    sock.sendall(struct.pack("<I", len(payload)) + payload)
    while True:
        fds = array.array("i")
        reply = msgpack.decode(read(struct.unpack("<I", read(4, fds))[0], fds))
        if reply.get("id") == last:
            assert reply["type"] != "error", reply
            return reply, list(fds)

hello, memory_fds = ask("hello", version=1, want_memory=True, client="outsider", require=["take-socket"])
regions = hello["memory"]["regions"]
memory = {r["id"]: mmap.mmap(fd, r["size"], mmap.MAP_SHARED, mmap.PROT_READ) for r, fd in zip(regions, memory_fds)}
started, (bitmaps_fd, take_fd) = ask("log-start")
end = max(max(b["pending"], b["taken"]) + 8 * b["words"] for b in started["bitmaps"])
bitmaps = mmap.mmap(bitmaps_fd, end, mmap.MAP_SHARED, mmap.PROT_READ)
take = socket.socket(fileno=take_fd)
ask("sync")
found = {}
for region, place in zip(regions, started["bitmaps"]):
    assert place["region"] == region["id"]
    pages = region["size"] // 4096
    pending = int.from_bytes(bitmaps[place["pending"]:place["pending"] + 8 * place["words"]], "little")
    assert pending == (1 << pages) - 1
    take.send(struct.pack("<IIQQQQ", 1, region["id"], 0, pages, started["generation"], 77))
    sequence, status, zero, taken = struct.unpack("<QIIQ", take.recv(2048)[:24])
    assert (sequence, status, zero, taken) == (77, 0, 0, pages)
    words = int.from_bytes(bitmaps[place["taken"]:place["taken"] + 8 * place["words"]], "little")
    assert words == pending
    first_bytes = memory[region["id"]][::4096]
    found[region["id"]] = {page: byte for page, byte in enumerate(first_bytes) if byte}
ask("pause")
state, _ = ask("save")
ask("prepare", migration="ab" * 16, destination="tcp://far:1", peer="far")
ask("resume")
ask("give-back", region=regions[0]["id"], first=0, words=struct.pack("<Q", 1 << 5))
ask("sync")
place = started["bitmaps"][0]
assert bitmaps[place["pending"]] == 1 << 5
status, _ = ask("status")
ask("leave")
print(json.dumps({"found": found, "saved": b"device state" in state["state"], "users": status["log_users"]}))
"""


async def test_a_client_written_from_the_page_alone_works(tmp_path: Path) -> None:

    path = tmp_path / "s"
    async with hosted_guest(tmp_path) as hosted, serving(hosted, path):
        hosted.machine.memory.pages(7)[3] = 0x5A
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", OUTSIDER, os.fspath(path), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await child.communicate()
        assert child.returncode == 0
        assert json.loads(out) == {
            "found": {"0": {}, "7": {"3": 0x5A}},
            "saved": True,
            "users": ["outsider"],
        }
        assert hosted.machine.calls == ["resume", "pause", "save", "resume"]  # type: ignore[attr-defined]
        assert not hosted.machine.logging  # type: ignore[attr-defined]
