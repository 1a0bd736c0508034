"""Addresses as an operator writes them: ``tcp://HOST:PORT``, ``unix:PATH``, ``file:PATH``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from amig.errors import UsageError

FORMS: Final = "tcp://HOST:PORT, unix:PATH or file:PATH"
_LATER: Final = ("tls", "ssh")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_UNIX_PATH_BYTES: Final = 107  # sockaddr_un.sun_path holds 108 with the closing zero


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpAddress:
    """``tcp://HOST:PORT``; an IPv6 address stands in brackets. Port 0 is for listening: the kernel takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

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


Address = TcpAddress | UnixAddress | FileAddress
SocketAddress = TcpAddress | UnixAddress


def parse(text: str) -> Address:
    """Return the address in ``text``; raises `UsageError` that says what is accepted."""
    match = _SCHEME.match(text)
    if match is None or "\0" in text:
        raise UsageError(f"{text!r} is not an address: write {FORMS}")
    scheme, rest = match[1].lower(), text[match.end() :]
    if scheme == "tcp":
        return _tcp(text, rest)
    if scheme in ("unix", "file"):
        path = _path(text, scheme, rest)
        return UnixAddress(path=path) if scheme == "unix" else FileAddress(path=path)
    if scheme in _LATER:
        raise UsageError(f"{scheme}:// is not available yet: write {FORMS}")
    raise UsageError(f"{scheme!r} in {text!r} is not a transport: write {FORMS}")


def parse_socket(text: str) -> SocketAddress:
    """Return an address that one can listen on or connect to; raises `UsageError` for a file."""
    address = parse(text)
    if isinstance(address, FileAddress):
        raise UsageError(f"{text!r} is a file; here a peer is needed: write tcp://HOST:PORT or unix:PATH")
    return address


def _tcp(text: str, rest: str) -> TcpAddress:
    if not rest.startswith("//"):
        raise UsageError(f"{text!r} lacks the slashes: write tcp://HOST:PORT")
    host, colon, port = rest[2:].removesuffix("/").rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise UsageError(f"{host!r} in {text!r} is not an IPv6 address") from None
    elif ":" in host or "[" in host or "]" in host:
        raise UsageError(f"the IPv6 address in {text!r} needs brackets and a port: tcp://[::1]:7000")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise UsageError(f"{text!r} needs a host and a port (0 to 65535): write tcp://HOST:PORT")
    if re.search(r"[\s/@?#]", host):
        raise UsageError(f"{host!r} in {text!r} is not a host name")
    return TcpAddress(host=host, port=int(port))


def _path(text: str, scheme: str, rest: str) -> str:
    path = rest
    if rest.startswith("//"):
        # unix://PATH and file://PATH: the authority of a URL is empty here, so the path must start with a slash.
        path = rest[2:]
        if not path.startswith("/"):
            raise UsageError(f"{text!r}: after {scheme}:// the path starts with a slash; or write {scheme}:PATH")
    if not path or path.endswith("/"):
        raise UsageError(f"{text!r} needs the path of a {'socket' if scheme == 'unix' else 'file'}: {scheme}:PATH")
    if scheme == "unix" and len(path.encode("utf-8", "surrogateescape")) > _UNIX_PATH_BYTES:
        raise UsageError(f"the socket path {path!r} is too long: the kernel takes {_UNIX_PATH_BYTES} bytes")
    return path
