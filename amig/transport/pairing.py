"""Pairing: an encrypted, mutually proven connection between two sides that have nothing set up.

The destination makes a certificate for this one time and a secret, and shows both in one address: the certificate's
fingerprint and the secret. A person carries it to the source. There the fingerprint says that this is the destination
and nobody in between, before anything is said; the secret then proves both sides to one another::

    source                                        destination
      │◀═ TLS 1.3, ALPN amig-pair/1: the certificate ═┤   fingerprint checked, or the source leaves
      │◀────────────────────── nonce, 32 bytes ───────┤
      ├── kind, 1 byte · nonce, 32 · proof, 32 ──────▶│   HMAC-SHA256(key, "…source" · kind · fingerprint · nonces)
      │◀────────────── answer, 1 byte · proof, 32 ────┤   HMAC-SHA256(key, "…destination" · …); zeros unless admitted

The first connection's key is the secret (kind 0). It is good once: both sides then take a key of their own from it
and the nonces, which proves the further connections of that very source (kind 1) and is kept in memory only. Since the
proofs cover the fingerprint that the source has seen, and TLS is proven to end at the holder of that certificate, they
can't be passed on from another connection. The secret is 160 random bits, so that there is nothing to be guessed off
line; on line, a few wrong ones lock it.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import hmac
import os
import secrets
import socket
import ssl
import time
from typing import Final

from amig.errors import AmigError, LinkLost, Untrusted
from amig.transport import tls
from amig.transport.address import SECRET_BYTES, PairAddress, TlsAddress, parse_socket
from amig.transport.admission import AdmittingListener
from amig.transport.listener import SocketListener
from amig.transport.tlsconn import TlsConnection

ALPN: Final = "amig-pair/1"
PAIRING_TIME: Final = 600.0
"""Seconds that an address is good for, unless said otherwise."""
MAX_TRIES: Final = 5
"""Wrong secrets after which no secret is right any more."""
_LABEL: Final = b"amig pairing 1 "
_NONCE: Final = 32
_PROOF: Final = 32


class Kind(enum.IntEnum):
    """Which key a source proves to have."""

    SECRET = 0
    SESSION = 1


class Answer(enum.IntEnum):
    """What a destination says to a proof."""

    ADMITTED = 0
    WRONG = 1
    USED = 2
    EXPIRED = 3
    LOCKED = 4


_TEXTS: Final = {
    Answer.WRONG: "it does not know this secret: copy all of the address that it showed",
    Answer.USED: (
        "this secret has been used already. If that was not you, somebody has seen the address: end the receiver, and "
        "look at what has arrived there"
    ),
    Answer.EXPIRED: "this address has expired: start `amig receive --pair` again",
    Answer.LOCKED: "too many wrong secrets were tried there: start `amig receive --pair` again",
}


class PairingSource:
    """The source's half: one for each migration, connects as often as needed."""

    def __init__(self, address: PairAddress) -> None:
        self._address = address
        self._session = b""
        context = tls.plain_context(ssl.PROTOCOL_TLS_CLIENT, ALPN)
        # The fingerprint takes the place of a CA and a name, and is checked before the first byte is sent.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._context = context

    async def connect(self, *, timeout: float) -> TlsConnection:
        """Connect and prove; raises `Untrusted`, `PeerError`, `LinkLost` within ``timeout`` seconds."""
        where = TlsAddress(host=self._address.host, port=self._address.port)
        began = time.monotonic()
        connection = await tls.connect(where, self._context, timeout=timeout, alpn=ALPN)
        try:
            async with asyncio.timeout(max(0.0, timeout - (time.monotonic() - began))):
                await self._prove(connection)
        except TimeoutError:
            connection.abort()
            raise LinkLost(f"{where} did not answer to the pairing within {timeout:g} s") from None
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _prove(self, connection: TlsConnection) -> None:
        fingerprint = self._address.fingerprint
        if not hmac.compare_digest(connection.identity, fingerprint):
            raise Untrusted(
                f"{connection.peer} is not the one that showed this address: its certificate has another fingerprint. "
                "Either the address is of an earlier `amig receive --pair`, or somebody is in between"
            )
        theirs = bytearray(_NONCE)
        await connection.recv_into(theirs)
        ours = secrets.token_bytes(_NONCE)
        kind = Kind.SESSION if self._session else Kind.SECRET
        key = self._session or self._address.secret
        about = bytes([kind]) + fingerprint + ours + theirs
        await connection.send(bytes([kind]) + ours + _mac(key, b"source", about))
        answer = bytearray(1 + _PROOF)
        await connection.recv_into(answer)
        if answer[0] != Answer.ADMITTED:
            known = answer[0] in list(Answer)
            raise Untrusted(
                f"{connection.peer} refused: " + (_TEXTS[Answer(answer[0])] if known else "it does not say why")
            )
        if not hmac.compare_digest(answer[1:], _mac(key, b"destination", about)):
            raise Untrusted(f"{connection.peer} took our proof and has none itself")
        if kind is Kind.SECRET:
            self._session = _mac(key, b"session", about)


class PairingHost:
    """The destination's half: makes certificate and secret, and decides who is let in."""

    def __init__(self, *, lasts: float = PAIRING_TIME) -> None:
        """``lasts``: seconds in which a source has to come."""
        self.fingerprint, self._context = _certificate(lasts)
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self.tries = 0
        """Wrong secrets so far."""
        self._lasts = lasts
        self._until = time.monotonic() + lasts
        self._session = b""

    async def listen(self, address: TlsAddress) -> PairingListener:
        """Listen; port 0 takes a free one. Raises `HostError` when the address can't be had."""
        return PairingListener(self, await tls.listening(address, self._context))

    @property
    def paired(self) -> bool:
        """Whether a source has come."""
        return bool(self._session)

    def over(self) -> AmigError | None:
        """Return why nobody can pair any more."""
        if self.paired:
            return None
        if self.tries >= MAX_TRIES:
            return Untrusted(
                f"{self.tries} wrong secrets were tried, so the address is void: start `amig receive --pair` again, "
                "where fewer can reach it"
            )
        if time.monotonic() >= self._until:
            return Untrusted(f"nobody came within {self._lasts:g} s, so the address is void: start again for a new one")
        return None

    async def admit(self, connection: TlsConnection) -> None:
        """Do the handshake, then let in whoever proves to be the source; raises `Untrusted` and says why to both."""
        await tls.shake(connection, ALPN)
        ours = secrets.token_bytes(_NONCE)
        await connection.send(ours)
        said = bytearray(1 + _NONCE + _PROOF)
        await connection.recv_into(said)
        kind, theirs, proof = said[0], bytes(said[1 : 1 + _NONCE]), said[1 + _NONCE :]
        about = bytes([kind]) + self.fingerprint + theirs + ours
        key = self._session if kind == Kind.SESSION else self.secret
        right = bool(key) and hmac.compare_digest(proof, _mac(key, b"source", about))
        # No waiting from here to the decision: of two who come with the secret, one is first.
        answer = self._judge(kind, right)
        if answer is not Answer.ADMITTED:
            await connection.send(bytes([answer]) + bytes(_PROOF))
            raise Untrusted(_REFUSALS[answer].format(tries=self.tries, most=MAX_TRIES))
        if kind == Kind.SECRET:
            self._session = _mac(key, b"session", about)
        connection.identity = hashlib.sha256(_LABEL + b"identity" + self._session).digest()
        await connection.send(bytes([answer]) + _mac(key, b"destination", about))

    def _judge(self, kind: int, right: bool) -> Answer:
        if kind == Kind.SESSION and self.paired:
            return Answer.ADMITTED if right else Answer.WRONG
        if self.paired:
            return Answer.USED
        if self.tries >= MAX_TRIES:
            return Answer.LOCKED
        if time.monotonic() >= self._until:
            return Answer.EXPIRED
        if kind == Kind.SECRET and right:
            return Answer.ADMITTED
        self.tries += 1
        return Answer.WRONG


_REFUSALS: Final = {
    Answer.WRONG: "it has a wrong secret ({tries} of {most})",
    Answer.USED: "it came with a pairing address after that had been used",
    Answer.EXPIRED: "it came after the address had expired",
    Answer.LOCKED: "too many wrong secrets have been tried",
}


class PairingListener(AdmittingListener[TlsConnection]):
    """Lets in one source, and that one as often as it likes."""

    def __init__(self, host: PairingHost, listener: SocketListener[TlsConnection]) -> None:
        super().__init__(listener, host.admit, over=host.over)
        self._host = host

    def invitation(self) -> PairAddress:
        """Return the address for the other side, secret and all; a wildcard becomes this machine's own address."""
        here = parse_socket(self.address)
        assert isinstance(here, TlsAddress)  # noqa: S101 - as we were told to listen
        return PairAddress(
            host=reachable(here.host), port=here.port, fingerprint=self._host.fingerprint, secret=self._host.secret
        )


def reachable(host: str) -> str:
    """Return what others may call a host that listens everywhere: the address of its default route, or its name."""
    if host not in ("0.0.0.0", "::"):  # noqa: S104 - recognized, not listened on
        return host
    family, far = (socket.AF_INET6, "2001:db8::1") if ":" in host else (socket.AF_INET, "192.0.2.1")
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))  # of UDP: a route is looked up, nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


def _mac(key: bytes, who: bytes, about: bytes | bytearray) -> bytes:
    return hmac.digest(key, _LABEL + who + b"\0" + about, "sha256")


def _certificate(lasts: float) -> tuple[bytes, ssl.SSLContext]:
    """Return the fingerprint of a new certificate, and a context that shows it. Its key never reaches a disk."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "amig pairing")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(seconds=lasts, days=1))
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = tls.plain_context(ssl.PROTOCOL_TLS_SERVER, ALPN)
    memory = os.memfd_create("amig-pairing", os.MFD_CLOEXEC)  # ssl takes keys from files only
    try:
        os.write(memory, pem)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest(), context
