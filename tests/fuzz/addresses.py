"""Addresses and pairing: text that anybody may have typed, and what strangers say while they prove who they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from amig.errors import AmigError, LinkLost, UsageError
from amig.transport import pairing, tls
from amig.transport.address import PairAddress, parse, parse_peer, parse_socket
from amig.transport.pairing import PairingHost, PairingSource

from .frames import Tape, drive
from .target import Target

WHO = bytes(range(32))
SECRET = bytes(range(100, 120))
PAIR = PairAddress(host="hostb", port=7000, fingerprint=WHO, secret=SECRET)


class Stranger(Tape):
    """A connection that takes what is sent to it, and counts it."""

    identity = WHO
    heard = 0

    async def send(self, *buffers: Any) -> None:
        self.heard += sum(memoryview(b).nbytes for b in buffers)

    async def recv_into(self, *views: Any) -> None:
        assert sum(memoryview(v).nbytes for v in views) <= 128
        await super().recv_into(*views)


def run(data: bytes) -> None:
    if data[:1] == b"\0":
        _admit(data[1:])
    elif data[:1] == b"\1":
        _prove(data[1:])
    else:
        _parse(data.decode(errors="surrogateescape"))


def _parse(text: str) -> None:
    for how in (parse, parse_peer, parse_socket):
        try:
            found = how(text)
        except UsageError as error:
            shown = str(error)
        else:
            shown = str(found)
            again = parse(found.reveal() if isinstance(found, PairAddress) else shown)
            assert again == found, f"{found} does not read back"
            assert isinstance(found.is_loopback, bool)
        secret = text.partition("#")[2].partition(".")[2]
        if text.lower().startswith("tls:") and len(secret) >= 8 and secret not in text.partition("#")[0]:
            assert secret not in shown, "a secret is shown"


class _Host(PairingHost):
    """Without a certificate, which takes long to make."""

    def __init__(self) -> None:
        with patch.object(pairing, "_certificate", lambda _: (WHO, None)):
            super().__init__()


async def _shaken(*_: Any) -> None:
    return


def _admit(said: bytes) -> None:
    host = _Host()
    stranger = Stranger(said)
    with patch.object(tls, "shake", _shaken):
        try:
            drive(host.admit(stranger))  # type: ignore[arg-type]
        except AmigError:
            assert not host.paired
        else:
            raise AssertionError("somebody without the secret was let in")
    assert stranger.heard <= 128


def _prove(said: bytes) -> None:
    source = PairingSource(PAIR)
    stranger = Stranger(said)
    try:
        drive(source._prove(stranger))  # type: ignore[arg-type]
    except (AmigError, LinkLost):
        pass
    else:
        raise AssertionError("a destination without the secret was believed")
    assert stranger.heard <= 128


def seeds() -> Iterator[tuple[str, bytes]]:
    good = ("tcp://127.0.0.1:7000", "tcp://[::1]:0", "tls://hostb:7000/", PAIR.reveal(), "ssh://hostb/web1")
    more = ("ssh://me@[fe80::1%25eth0]:22/web1", "ssh://me@hostb:2222/web1", "unix:///run/x", "unix:x", "file:/a/b")
    for number, text in enumerate((*good, *more)):
        yield f"address-{number}", text.encode()
    yield "source", b"\0" + bytes([0]) + bytes(64)
    yield "source-session", b"\0" + bytes([1]) + bytes(64)
    yield "destination", b"\1" + bytes(32) + bytes([0]) + bytes(32)
    yield "destination-used", b"\1" + bytes(32) + bytes([2]) + bytes(32)


TARGET = Target(
    name="addresses",
    run=run,
    seeds=seeds,
    most=512,
    memory=2 << 20,
    words=(b"tcp://", b"tls://", b"ssh://", b"unix:", b"file:", b"[::1]", b"/#", b"@", b":7000"),
)
