"""Serial output on its way to a file or to standard output."""

import os
import stat
import threading

import pytest

from amig.errors import HostError, UsageError
from amig.host import console as module
from amig.host.console import SerialChoice, SerialKind, SerialOutput


def opened(words):
    output = SerialChoice.parse(words).open()
    assert output is not None
    return output


def test_output_is_appended_to_a_private_file(tmp_path):
    path = tmp_path / "serial"
    for text in (b"first\n", b"second\n"):
        output = opened(f"file:{path}")
        output(text)
        output.close()
        output.close()
    assert path.read_bytes() == b"first\nsecond\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_output_reaches_the_file_without_closing(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    output = SerialOutput.append(fifo)
    try:
        output(b"now")
        assert os.read(reader, 100) == b"now"
    finally:
        output.close()
        os.close(reader)


def test_a_file_that_takes_nothing_never_blocks_the_guest(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BUFFER_BYTES", 1000)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    output = SerialOutput.append(fifo)
    try:
        for _ in range(300):
            output(bytes(1000))  # far more than a pipe takes
        output(b"the end")
        os.set_blocking(reader, True)
        closer = threading.Thread(target=output.close)
        closer.start()
        seen = bytearray()
        while block := os.read(reader, 65536):
            seen += block
        closer.join()
        assert seen.endswith(b"the end")
        assert b"bytes of serial output dropped" in seen
    finally:
        os.close(reader)


def test_a_reader_that_goes_away_ends_the_output_not_the_guest(tmp_path, caplog):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    output = SerialOutput.append(fifo)
    os.close(reader)
    output(b"to nobody")
    output.close()
    output(b"dropped")
    assert "ends here: Broken pipe" in caplog.text


def test_standard_output_stays_open(capfd):
    output = opened("stdio")
    output(b"hello\r\n")
    output.close()
    os.fstat(1)
    assert capfd.readouterr().out == "hello\r\n"


def test_what_can_be_asked_for(tmp_path):
    assert SerialChoice.parse("none").open() is None
    assert SerialChoice.parse("stdio").kind is SerialKind.STDIO
    assert SerialChoice.parse(f"file:{tmp_path}/a:b").path == tmp_path / "a:b"
    for words in ("tty", "file:", "pipe:x", ""):
        with pytest.raises(UsageError, match="file:PATH"):
            SerialChoice.parse(words)


def test_what_can_not_be_opened_is_said(tmp_path):
    with pytest.raises(HostError, match=r"can't open .*: No such file"):
        SerialOutput.append(tmp_path / "no" / "serial")
    os.mkfifo(tmp_path / "unread")
    with pytest.raises(HostError, match="No such device"):
        SerialOutput.append(tmp_path / "unread")


def test_nothing_is_left_after_close(tmp_path):
    threads, descriptors = threading.active_count(), set(os.listdir("/proc/self/fd"))
    output = SerialOutput.append(tmp_path / "serial")
    output(b"x")
    output.close()
    output(b"dropped")
    assert threading.active_count() == threads
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert (tmp_path / "serial").read_bytes() == b"x"
