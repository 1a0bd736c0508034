"""Addresses as an operator writes them.

==============================  =======================================================================================
``tcp://HOST:PORT``             in the clear; outside this machine only where that was asked for
``tls://HOST:PORT``             TLS, both sides with certificates
``tls://HOST:PORT/#FP.SECRET``  TLS with a certificate of this fingerprint, and a secret for one use: `receive --pair`
``ssh://[USER@]HOST[:PORT]/N``  through ssh: starts ``amig receive --stdio --name N`` there
``unix:PATH``                   a socket in the file system
``file:PATH``                   a snapshot
==============================  =======================================================================================

``str`` of an address never has a secret in it, and no error text here repeats what stands behind a ``#``.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from dataclasses import dataclass, field
from typing import Final

from amig.errors import UsageError

FORMS: Final = "tls://HOST:PORT, ssh://HOST/NAME, tcp://HOST:PORT, unix:PATH or file:PATH"
FINGERPRINT_BYTES: Final = 32
SECRET_BYTES: Final = 20
"""160 bits: nobody guesses it, and it is short enough to be pasted."""
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_UNIX_PATH_BYTES: Final = 107  # sockaddr_un.sun_path holds 108 with the closing zero
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,63}")
_SSH_HOST: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")
_GUEST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _HostAddress:
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether it can't leave this machine, as far as the text says; nothing is looked up."""
        if self.host.lower().rstrip(".") == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpAddress(_HostAddress):
    """``tcp://HOST:PORT``; an IPv6 address stands in brackets. Port 0 is for listening: the kernel takes a free one."""

    def __str__(self) -> str:
        return f"tcp://{_authority(self.host, self.port)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsAddress(_HostAddress):
    """``tls://HOST:PORT``: the same through TLS, where both sides show certificates."""

    def __str__(self) -> str:
        return f"tls://{_authority(self.host, self.port)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAddress(TlsAddress):
    """``tls://HOST:PORT/#FINGERPRINT.SECRET``: as ``amig receive --pair`` prints it."""

    fingerprint: bytes
    """SHA-256 of the certificate, in DER, that must be shown there."""
    secret: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"tls://{_authority(self.host, self.port)}/#{_encode(self.fingerprint)}.…"

    def reveal(self) -> str:
        """Return the whole address, secret and all: for the one place that shows it."""
        return f"tls://{_authority(self.host, self.port)}/#{_encode(self.fingerprint)}.{_encode(self.secret)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SshAddress:
    """``ssh://[USER@]HOST[:PORT]/NAME``; what is left out is for ssh's own configuration to say."""

    host: str
    name: str
    """What the guest is called there."""
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"ssh://{user}{host}{port}/{self.name}"

    @property
    def is_loopback(self) -> bool:
        """Not told by the text: ssh has names of its own."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixAddress:
    """``unix:PATH``: a socket in the file system."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def is_loopback(self) -> bool:
        """A unix socket never leaves the machine."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class FileAddress:
    """``file:PATH``: a snapshot."""

    path: str

    def __str__(self) -> str:
        return f"file:{self.path}"

    @property
    def is_loopback(self) -> bool:
        """A file is not a peer at all."""
        return True


SocketAddress = TcpAddress | TlsAddress | UnixAddress
"""What can be listened on."""
PeerAddress = SocketAddress | SshAddress
"""What can be connected to."""
Address = PeerAddress | FileAddress


def parse(text: str) -> Address:
    """Return the address in ``text``; raises `UsageError` that says what is accepted, and never repeats a secret."""
    match = _SCHEME.match(text)
    if match is None or "\0" in text:
        raise UsageError(f"{_shown(text)} is not an address: write {FORMS}")
    scheme, rest = match[1].lower(), text[match.end() :]
    if scheme == "tcp":
        host, port = _host_and_port(text, scheme, rest)
        return TcpAddress(host=host, port=port)
    if scheme == "tls":
        return _tls(text, rest)
    if scheme == "ssh":
        return _ssh(text, rest)
    if scheme in ("unix", "file"):
        path = _path(text, scheme, rest)
        return UnixAddress(path=path) if scheme == "unix" else FileAddress(path=path)
    raise UsageError(f"{scheme!r} in {_shown(text)} is not a transport: write {FORMS}")


def parse_peer(text: str) -> PeerAddress:
    """Return an address that one can connect to; raises `UsageError` for a file."""
    address = parse(text)
    if isinstance(address, FileAddress):
        raise UsageError(f"{text!r} is a file; here a peer is needed: write tls://HOST:PORT, ssh://HOST/NAME, …")
    return address


def parse_socket(text: str) -> SocketAddress:
    """Return an address that one can listen on; raises `UsageError` for the others."""
    address = parse_peer(text)
    if isinstance(address, SshAddress):
        raise UsageError(f"{text!r}: nothing listens on ssh; amig migrate starts amig receive there by itself")
    if isinstance(address, PairAddress):
        raise UsageError(f"{address} is for the other side: with --pair, write tls://HOST:PORT here")
    return address


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _shown(text: str) -> str:
    """Return what was typed, without what may be a secret."""
    before, mark, _ = text.partition("#")
    return repr(before + ("#…" if mark else ""))


def _host_and_port(text: str, scheme: str, rest: str) -> tuple[str, int]:
    form = f"{scheme}://HOST:PORT"
    if not rest.startswith("//"):
        raise UsageError(f"{_shown(text)} lacks the slashes: write {form}")
    host, colon, port = rest[2:].removesuffix("/").rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = _ipv6(text, host)
    elif ":" in host or "[" in host or "]" in host:
        raise UsageError(f"the IPv6 address in {_shown(text)} needs brackets and a port: {scheme}://[::1]:7000")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise UsageError(f"{_shown(text)} needs a host and a port (0 to 65535): write {form}")
    if re.search(r"[\s/@?#]", host):
        raise UsageError(f"the host in {_shown(text)} is not a host name")
    return host, int(port)


def _ipv6(text: str, host: str) -> str:
    try:
        ipaddress.IPv6Address(host[1:-1])
    except ValueError:
        raise UsageError(f"what stands in brackets in {_shown(text)} is not an IPv6 address") from None
    return host[1:-1]


def _tls(text: str, rest: str) -> TlsAddress:
    where, mark, code = rest.partition("#")
    host, port = _host_and_port(text, "tls", where)
    if not mark:
        return TlsAddress(host=host, port=port)
    fingerprint, _, secret = code.strip().partition(".")
    first, second = _decode(fingerprint, FINGERPRINT_BYTES), _decode(secret, SECRET_BYTES)
    if first is None or second is None:
        raise UsageError(
            f"{_shown(text)}: what stands behind the # is not whole; copy all of the address that "
            "`amig receive --pair` showed. It is shown once, and good once"
        )
    return PairAddress(host=host, port=port, fingerprint=first, secret=second)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str, size: int) -> bytes | None:
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        return None
    # One text for each value: what is not how we would write it is a copy that went wrong.
    return data if len(data) == size and _encode(data) == text else None


def _ssh(text: str, rest: str) -> SshAddress:
    form = "ssh://[USER@]HOST[:PORT]/NAME"
    if not rest.startswith("//"):
        raise UsageError(f"{_shown(text)} lacks the slashes: write {form}")
    where, _, name = rest[2:].partition("/")
    if not _GUEST.fullmatch(name):
        raise UsageError(f"{_shown(text)} needs the name that the guest shall have there: write {form}")
    user, at, host = where.rpartition("@")
    host, port = _ssh_host(text, host)
    # A leading '-' would be read as an option by ssh.
    if (at and not _USER.fullmatch(user)) or (port is not None and not 0 < port <= 65535):
        raise UsageError(f"the user or the port in {_shown(text)} makes no sense: write {form}")
    return SshAddress(host=host, name=name, user=user or None, port=port)


def _ssh_host(text: str, where: str) -> tuple[str, int | None]:
    bracketed = re.fullmatch(r"(\[[^\]]*\])(?::([0-9]{1,5}))?", where)
    if bracketed:
        return _ipv6(text, bracketed[1]), int(bracketed[2]) if bracketed[2] else None
    plain = re.fullmatch(r"([^:]*)(?::([0-9]{1,5}))?", where)
    if plain is None or not _SSH_HOST.fullmatch(plain[1]):
        raise UsageError(f"the host in {_shown(text)} is not a host name: write ssh://[USER@]HOST[:PORT]/NAME")
    return plain[1], int(plain[2]) if plain[2] else None


def _path(text: str, scheme: str, rest: str) -> str:
    path = rest
    if rest.startswith("//"):
        # unix://PATH and file://PATH: the authority of a URL is empty here, so the path must start with a slash.
        path = rest[2:]
        if not path.startswith("/"):
            raise UsageError(f"{text!r}: after {scheme}:// the path starts with a slash; or write {scheme}:PATH")
        path = "/" + path.lstrip("/")  # with more of them it would read back as a URL with a host in it
    if not path or path.endswith("/"):
        raise UsageError(f"{text!r} needs the path of a {'socket' if scheme == 'unix' else 'file'}: {scheme}:PATH")
    if scheme == "unix" and len(path.encode("utf-8", "surrogateescape")) > _UNIX_PATH_BYTES:
        raise UsageError(f"the socket path {path!r} is too long: the kernel takes {_UNIX_PATH_BYTES} bytes")
    return path
