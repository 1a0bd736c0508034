"""TLS: who may talk to whom, connecting, and listening.

TLS 1.3 only, no session tickets (nothing is ever resumed), both sides with certificates of a CA that the other side was
told to trust, the server's name checked against its certificate, and ``amig/1`` agreed on as the protocol spoken within
(ALPN), so that a certificate that is also used for something else can't be led here.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
from typing import Any, Final

from amig.errors import LinkLost, PeerError, UsageError
from amig.transport import tcp
from amig.transport.address import TlsAddress
from amig.transport.admission import AdmittingListener
from amig.transport.listener import SocketListener
from amig.transport.options import TlsFiles
from amig.transport.tlsconn import TlsConnection

ALPN: Final = "amig/1"


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """Return what a source shows and demands; raises `UsageError` for files that can't be used."""
    return _load(plain_context(ssl.PROTOCOL_TLS_CLIENT, ALPN), files)


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """Return what a destination shows and demands; raises `UsageError` for files that can't be used."""
    context = plain_context(ssl.PROTOCOL_TLS_SERVER, ALPN)
    context.verify_mode = ssl.CERT_REQUIRED
    return _load(context, files)


def plain_context(kind: int, alpn: str) -> ssl.SSLContext:
    """Return a context for TLS 1.3 and nothing else, that trusts nobody yet."""
    # Not ssl.create_default_context: it would trust the system's CAs, and write keys where SSLKEYLOGFILE says.
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([alpn])
    if kind == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    return context


async def connect(address: TlsAddress, context: ssl.SSLContext, *, timeout: float, alpn: str = ALPN) -> TlsConnection:
    """Connect and check the server; raises `Untrusted`, `PeerError`, `LinkLost` within ``timeout`` seconds."""

    def wrap(sock: socket.socket, _: str) -> TlsConnection:
        return TlsConnection(sock, str(address), context, server_hostname=address.host)

    try:
        async with asyncio.timeout(timeout):
            connection = await tcp.connect_as(address, wrap, timeout=timeout)
            try:
                await shake(connection, alpn)
            except BaseException:
                connection.abort()
                raise
            return connection
    except TimeoutError:
        raise LinkLost(f"{address} did not finish the TLS handshake within {timeout:g} s") from None


async def listen(address: TlsAddress, context: ssl.SSLContext) -> AdmittingListener[TlsConnection]:
    """Listen; port 0 takes a free one. Raises `HostError` when the address can't be had."""

    async def admit(connection: TlsConnection) -> None:
        await shake(connection, ALPN)

    return AdmittingListener(await listening(address, context), admit)


async def listening(address: TlsAddress, context: ssl.SSLContext) -> SocketListener[TlsConnection]:
    """Listen for connections on which nothing has been said yet, not even a handshake."""

    def wrap(sock: socket.socket, name: Any) -> TlsConnection:
        tcp.tune(sock)
        return TlsConnection(sock, str(TlsAddress(host=name[0], port=name[1])), context, server_side=True)

    return await tcp.listen_as(address, wrap)


async def shake(connection: TlsConnection, alpn: str) -> None:
    """Do the handshake and see to it that the other side speaks our protocol; raises as `connect` does."""
    await connection.handshake()
    if connection.protocol != alpn:
        raise PeerError(
            f"{connection.peer} speaks TLS, but not {alpn} in it: "
            + (
                "is `amig receive tls://` listening there, without --pair?"
                if alpn == ALPN
                else "is `amig receive --pair` listening there?"
            )
        )


def _load(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    cert, key, ca = files.paths()
    for path, what, option in ((cert, "certificate", "--tls-cert"), (key, "key", "--tls-key"), (ca, "CA", "--tls-ca")):
        try:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
        except OSError as error:
            raise UsageError(
                f"tls:// needs a {what}: can't read {path}: {error.strerror}. Give {option} FILE (docs/security.md "
                "shows how to make one), or use `amig receive --pair`, which needs no files"
            ) from error
        if what == "key" and mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
            raise UsageError(f"the key {path} is open to other users: chmod 0600 {path}")
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise UsageError(
            f"the certificate {cert} and the key {key} can't be used: {_reason(error)}. They must be PEM and belong "
            "together, and the key must have no passphrase"
        ) from error
    try:
        context.load_verify_locations(cafile=ca)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise UsageError(f"the CA {ca} can't be used: {_reason(error)}. It must be a PEM certificate") from error
    return context


def _no_passphrase() -> bytes:
    # Without this OpenSSL would ask on the terminal, in the middle of everything.
    return b""


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "it can't be read"
    return str(reason).replace("_", " ").lower()
