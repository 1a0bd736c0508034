"""A TLS connection for bulk data.

OpenSSL works on memory here, not on the socket: a quarter of a MiB is encrypted in one call and sent in one, and one
read brings as many records as have come. With OpenSSL on the socket each record of 16 KiB costs system calls of its
own, which took twice the processor time when sending. It also keeps both ways apart: encrypting never has to wait, so
a task that sends and one that receives never need the same thing of the socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from amig.errors import LinkLost, MigrationError, PeerError, Untrusted
from amig.transport.base import PageMover
from amig.transport.sock import SocketConnection

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE: Final = 256 << 10
"""Bytes encrypted at once."""
READ: Final = 256 << 10
"""Most bytes read at once; what is decrypted of them waits in OpenSSL."""
_HANDSHAKE_READ: Final = 16 << 10  # strangers get no more memory than that
_SMALL: Final = 32 << 10
_TCPI_BYTES_ACKED: Final = 120  # offsets in struct tcp_info, linux/tcp.h
_TCPI_NOTSENT: Final = 144
_TCPI_BYTES_SENT: Final = 200  # and bytes_retrans behind it

_NOT_TLS: Final = frozenset(
    {
        "WRONG_VERSION_NUMBER",
        "HTTP_REQUEST",
        "HTTPS_PROXY_REQUEST",
        "UNKNOWN_PROTOCOL",
        "UNEXPECTED_MESSAGE",
        "BAD_RECORD_TYPE",
        "PACKET_LENGTH_TOO_LONG",
        "ENCRYPTED_LENGTH_TOO_LONG",
        "DATA_LENGTH_TOO_LONG",
        "RECORD_LAYER_FAILURE",
        "NOT_SSL_RECORD_LAYER",
        "INVALID_CCS_MESSAGE",
    }
)
_OLD_TLS: Final = frozenset({"UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "VERSION_TOO_LOW"})
_REFUSED_US: Final = (
    "CERTIFICATE_REQUIRED",
    "ALERT_UNKNOWN_CA",
    "ALERT_BAD_CERTIFICATE",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REVOKED",
    "UNSUPPORTED_CERTIFICATE",
    "CERTIFICATE_UNKNOWN",
    "ALERT_ACCESS_DENIED",
    "ALERT_DECRYPT_ERROR",
)


class TlsConnection(SocketConnection):
    """`Connection` over TLS 1.3. `handshake` comes first; bytes are counted before encryption."""

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
    ) -> None:
        super().__init__(sock, peer)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        self._cipher = memoryview(bytearray(_HANDSHAKE_READ))
        self._identity = b""

    @property
    def pages(self) -> PageMover | None:
        """None: what is encrypted must hold still."""
        return None

    @property
    def identity(self) -> bytes:
        """SHA-256 of the peer's certificate, or what pairing has put in its place; empty when it proved nothing."""
        return self._identity

    @identity.setter
    def identity(self, identity: bytes) -> None:
        self._identity = identity

    @property
    def version(self) -> str:
        """The version of TLS in use."""
        return self._tls.version() or ""

    @property
    def protocol(self) -> str:
        """What both sides agreed to speak (ALPN)."""
        return self._tls.selected_alpn_protocol() or ""

    async def handshake(self) -> None:
        """Agree on keys and check the peer's certificate as the context says; the caller sets a time limit.

        Raises `Untrusted`, `PeerError` (no TLS there, or too old a one), `LinkLost`. A server has checked the client's
        certificate when this returns; a client learns only with its first read whether its own was accepted.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                if not await self._more():
                    raise LinkLost(
                        f"{self._peer} ended the connection in the TLS handshake: is it plain tcp:// on that side?"
                    ) from None
            except ssl.SSLError as error:
                self._say_alert()
                raise explain(error, self._peer) from error
            else:
                break
        await self._flush()
        self._cipher = memoryview(bytearray(READ))
        shown = self._tls.getpeercert(binary_form=True)
        self._identity = hashlib.sha256(shown).digest() if shown else b""

    def outstanding(self) -> int | None:
        """Bytes sent, as encrypted, that the peer's kernel has not acknowledged (TCP_INFO)."""
        if not self._tcp or self._fd < 0:
            return None
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        if len(info) < _TCPI_BYTES_SENT + 16:
            return None
        (acked,) = struct.unpack_from("<Q", info, _TCPI_BYTES_ACKED)
        (waiting,) = struct.unpack_from("<I", info, _TCPI_NOTSENT)
        sent, again = struct.unpack_from("<QQ", info, _TCPI_BYTES_SENT)
        return max(0, int(sent) - int(again) - int(acked) + int(waiting))

    async def close(self) -> None:
        """Say that nothing more comes, then as `SocketConnection.close`."""
        if not self._send_broken and self._fd >= 0:
            with contextlib.suppress(OSError):
                self._tls.unwrap()  # its answer is not waited for
            self._say_alert()
        await super().close()

    async def _send_some(self, buffers: list[Buffer]) -> None:
        for piece in _pieces(buffers):
            self._tls.write(piece)
            await self._flush()
            self._sent += len(piece)
            await self._breathe(len(piece))

    async def _flush(self) -> None:
        left = memoryview(self._outgoing.read())
        try:
            while left:
                try:
                    took = self._sock.send(left)
                except BlockingIOError:
                    await self._writable()
                else:
                    left = left[took:]
        except OSError as error:
            raise self._gone(self._send_broken or _why(error)) from error
        finally:
            if left:  # what was encrypted once can't be encrypted again: the stream has a hole
                self._send_broken = self._send_broken or "a message to it was cut off"

    async def _fill(self, view: memoryview) -> None:
        await self._scatter([view])

    async def _scatter(self, views: list[memoryview]) -> None:
        size = sum([len(v) for v in views])
        done = 0
        for view in views:
            at = 0
            while at < len(view):
                came = await self._decrypt(view[at:])
                if not came:
                    raise self._ended(done, size)
                self._received += came
                at += came
                done += came
        await self._breathe(size)

    async def _decrypt(self, view: memoryview) -> int:
        """Fill some of ``view``; returns how much, 0 at the end of the stream."""
        while True:
            try:
                return int(self._tls.read(len(view), view))
            except ssl.SSLWantReadError:
                if not await self._more():
                    return 0
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0
            except ssl.SSLError as error:
                self._say_alert()
                self._recv_broken = str(explain(error, self._peer))
                raise explain(error, self._peer) from error

    async def _more(self) -> bool:
        """Read what has come, still encrypted; False at the end of the stream."""
        while True:
            try:
                came = self._sock.recv_into(self._cipher)
            except BlockingIOError:
                await self._readable()
            except OSError as error:
                self._recv_broken = self._recv_broken or _why(error)
                raise self._gone(self._recv_broken) from error
            else:
                self._incoming.write(self._cipher[:came])
                return came > 0

    def _say_alert(self) -> None:
        """Give the kernel what TLS itself wants to say, if it takes it at once."""
        if self._fd >= 0 and not self._sending:
            with contextlib.suppress(OSError):
                self._sock.send(self._outgoing.read())


def explain(error: ssl.SSLError, peer: str) -> MigrationError:
    """Return the error that a failure of TLS means to the operator."""
    reason = (error.reason or "").upper().replace(" ", "_")
    if isinstance(error, ssl.SSLCertVerificationError):
        return Untrusted(
            f"{peer} showed a certificate that does not prove who it is: {error.verify_message.rstrip('.')}"
        )
    if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return Untrusted(f"{peer} showed no certificate")
    if reason in _OLD_TLS:
        return PeerError(f"{peer} does not speak TLS 1.3, and amig nothing older")
    if any(word in reason for word in _REFUSED_US):
        said = reason.partition("ALERT_")[2].replace("_", " ").lower()
        return Untrusted(f"{peer} did not accept our certificate: {said}. Is it of the CA that is trusted there?")
    if reason in _NOT_TLS:
        return PeerError(f"{peer} does not speak TLS: is it plain tcp:// on that side?")
    return PeerError(f"TLS with {peer} failed: {reason.replace('_', ' ').lower() or 'broken data'}")


def _pieces(buffers: list[Buffer]) -> Iterator[memoryview]:
    """Yield the content of ``buffers`` as pieces that are worth a call: small ones joined, large ones cut."""
    small: list[memoryview] = []
    gathered = 0
    for buffer in buffers:
        view = memoryview(buffer)
        size = view.nbytes
        if not size:
            continue
        view = view.cast("B")
        if size < _SMALL and gathered + size <= PIECE:
            small.append(view)
            gathered += size
            continue
        if small:
            yield memoryview(b"".join(small))
            small, gathered = [], 0
        if size < _SMALL:
            small, gathered = [view], size
            continue
        for at in range(0, size, PIECE):
            yield view[at : at + PIECE]
    if small:
        yield small[0] if len(small) == 1 else memoryview(b"".join(small))


def _why(error: OSError) -> str:
    return error.strerror or str(error)
