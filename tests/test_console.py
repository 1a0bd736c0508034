"""Serial output on its way to files and terminals."""

import os
import stat
import threading

import pytest

from amig.errors import HostError, UsageError
from amig.host import console as module
from amig.host.console import CLIENT_BYTES, MAX_CLIENTS, SCROLLBACK_BYTES, Console


def nothing():
    pass


def test_output_is_appended_to_a_private_file(tmp_path):
    path = tmp_path / "serial"
    for text in (b"first\n", b"second\n"):
        console = Console.parse(f"file:{path}")
        console.write(text)
        console.close()
        console.close()
    assert path.read_bytes() == b"first\nsecond\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_output_reaches_the_file_without_closing(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    console = Console(fifo)
    try:
        console.write(b"now")
        assert os.read(reader, 100) == b"now"
    finally:
        console.close()
        os.close(reader)


def test_a_file_that_takes_nothing_never_blocks_the_guest(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 1000)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    console = Console(fifo)
    try:
        for _ in range(300):
            console.write(bytes(1000))  # far more than a pipe takes
        console.write(b"the end")
        os.set_blocking(reader, True)
        closer = threading.Thread(target=console.close)
        closer.start()
        seen = bytearray()
        while block := os.read(reader, 65536):
            seen += block
        closer.join()
        assert seen.endswith(b"the end")
        assert b"bytes of console output dropped" in seen
    finally:
        os.close(reader)


def test_a_new_client_gets_the_scrollback_then_what_comes():
    console = Console.parse("none")
    console.write(b"before ")
    wakes = []
    client = console.attach(lambda: wakes.append(1))
    assert client.take() == b"before "
    assert client.take() == b""
    console.write(b"a")
    console.write(b"b")
    assert (client.take(), wakes) == (b"ab", [1]), "woken once, not for every byte"
    console.write(b"c")
    assert len(wakes) == 2
    client.close()
    client.close()
    console.write(b"d")
    assert client.take() == b"c"


def test_the_scrollback_is_bounded():
    console = Console()
    for i in range(300):
        console.write(bytes([i % 256]) * 1024)
    client = console.attach(nothing)
    assert client.take() == b"".join(bytes([i % 256]) * 1024 for i in range(300))[-SCROLLBACK_BYTES:]


def test_a_slow_client_loses_the_oldest_and_is_told():
    console = Console()
    slow, quick = console.attach(nothing), console.attach(nothing)
    seen = 0
    for _ in range(CLIENT_BYTES // 1000 + 10):
        console.write(bytes(1000))
        seen += len(quick.take())
    data = slow.take()
    assert data.startswith(b"\r\n[amig: ")
    assert b"dropped" in data
    assert len(data) < CLIENT_BYTES + 100
    assert seen == (CLIENT_BYTES // 1000 + 10) * 1000


def test_clients_are_limited():
    console = Console()
    clients = [console.attach(nothing) for _ in range(MAX_CLIENTS)]
    with pytest.raises(HostError, match="close one"):
        console.attach(nothing)
    clients[0].close()
    console.attach(nothing)


def test_what_can_not_be_opened_is_said(tmp_path):
    with pytest.raises(HostError, match=r"can't open .*: No such file"):
        Console(tmp_path / "no" / "serial")
    os.mkfifo(tmp_path / "unread")
    with pytest.raises(HostError, match="No such device"):
        Console(tmp_path / "unread")
    for words in ("tty", "file:", "pipe:x"):
        with pytest.raises(UsageError, match="file:PATH"):
            Console.parse(words)


def test_nothing_is_left_after_close(tmp_path):
    threads, descriptors = threading.active_count(), set(os.listdir("/proc/self/fd"))
    console = Console(tmp_path / "serial")
    console.write(b"x")
    console.close()
    console.write(b"dropped")
    assert threading.active_count() == threads
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert (tmp_path / "serial").read_bytes() == b"x"
