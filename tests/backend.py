"""A device backend for tests, as a process of its own: it attaches, writes a self-checking pattern, and logs it.

usage: backend.py SOCKET FIRST-PAGE PAGES FORGET

Follows docs/guest-protocol.md with nothing of amig but msgpack. Each write gives a page of its part (guest-physical, in
pages) the next generation: every word of the page is ``generation << 32 | page``. Prints the generations of all pages
as one line of JSON each time that it was stopped, and when its input ends. With FORGET=1 it logs nothing: tests must
see that pages are lost then.
"""

from __future__ import annotations

import array
import ctypes
import json
import mmap
import random
import select
import socket
import struct
import sys

import msgspec
import numpy as np


def main(path: str, first: int, pages: int, forget: bool) -> None:
    syscall = ctypes.CDLL(None).syscall
    syscall.argtypes = (*[ctypes.c_long, ctypes.c_void_p, ctypes.c_int] + [ctypes.c_long] * 2, *[ctypes.c_void_p] * 2)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    requests = 0

    def send(type_: str, **fields: object) -> None:
        nonlocal requests
        requests += 1
        frame = msgspec.msgpack.encode({"type": type_, "id": requests, **fields})
        sock.sendall(struct.pack("<I", len(frame)) + frame)

    def exactly(size: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            part, extra, _, _ = sock.recvmsg(size - len(data), socket.CMSG_SPACE(4 * 66))
            for level, kind, content in extra:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds += array.array("i", content)
            if not part:
                sys.exit(0)
            data += part
        return data

    def receive() -> tuple[dict, list[int]]:
        fds: list[int] = []
        (size,) = struct.unpack("<I", exactly(4, fds))
        message = msgspec.msgpack.decode(exactly(size, fds))
        assert message["type"] != "error", message
        return message, fds

    send("hello", version=1, require=["vhost"], client="test backend")
    receive()
    send("vhost-attach")
    attached, fds = receive()
    maps = [mmap.mmap(fd, r["size"]) for fd, r in zip(fds, attached["memory"]["regions"], strict=False)]
    log_map = mmap.mmap(fds[-1], attached["log_bytes"])
    log = ctypes.addressof(ctypes.c_char.from_buffer(log_map))
    (slot,) = [s for s in attached["memory"]["slots"] if s["guest_phys"] <= first * 4096 < s["guest_phys"] + s["size"]]
    (index,) = [i for i, r in enumerate(attached["memory"]["regions"]) if r["id"] == slot["region"]]
    start = first * 4096 - slot["guest_phys"] + slot["offset"]
    memory = np.frombuffer(maps[index], np.uint64)[start // 8 : start // 8 + 512 * pages].reshape(pages, 512)
    generations = [0] * pages
    running = attached["running"]
    rng = random.Random(1)

    def report() -> None:
        print(json.dumps(generations), flush=True)

    print("attached", flush=True)
    while True:
        ready, _, _ = select.select([sock, sys.stdin], [], [], 0.0005 if running else None)
        if sys.stdin in ready:
            report()
            send("vhost-detach")
            while receive()[0].get("id") != requests:
                pass
            return
        if sock in ready:
            message, _ = receive()
            if message["type"] == "vhost-run":
                running = True
            elif message["type"] == "vhost-stop":
                running = False
                report()
                send("vhost-stopped", number=message["number"])
        if running:
            for page in rng.sample(range(pages), 4):
                generations[page] += 1
                memory[page] = generations[page] << 32 | page
                if not forget:
                    at = first + page
                    word = log + at // 32 * 4
                    # An atomic "or" without a library: FUTEX_WAKE_OP with FUTEX_OP_OR of 1 << operand, waking nobody.
                    assert syscall(202, word, 5 | 128, 0, 0, word, (2 | 8) << 28 | at % 32 << 12) == 0


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
