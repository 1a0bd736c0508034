"""What a peer must prove, and with what we prove who we are."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from amig.errors import UsageError
from amig.transport.address import TcpAddress


def tls_folder() -> Path:
    """Return where certificates are looked for: $XDG_CONFIG_HOME/amig/tls, or ~/.config/amig/tls."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "amig" / "tls"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files for ``tls://``; None: the file of that name in `tls_folder`."""

    cert: str | None = None
    """Our certificate, and those between it and the CA's."""
    key: str | None = None
    """Its key, without a passphrase; nobody else may read it."""
    ca: str | None = None
    """Whose certificates a peer may show. Everybody with one of them may send a guest here: use a CA of your own."""

    def paths(self) -> tuple[str, str, str]:
        """Return the paths of certificate, key and CA."""
        folder = tls_folder()
        return (
            self.cert or str(folder / "cert.pem"),
            self.key or str(folder / "key.pem"),
            self.ca or str(folder / "ca.pem"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """How peers are reached, and what is asked of them."""

    insecure: bool = False
    """Whether plain TCP may leave this machine: everybody on the way can read and change the guest."""
    tls: TlsFiles = field(default_factory=TlsFiles)
    ssh: tuple[str, ...] = ("ssh",)
    """The ssh client, with options of one's own (``-F``, ``-i``)."""
    remote_amig: str = "amig"
    """The command ``amig`` on the far side of ssh, as the shell there is given it."""


def check_plain(address: TcpAddress, options: LinkOptions, *, listening: bool) -> None:
    """Raise `UsageError` for plain TCP that leaves this machine and was not asked for."""
    if address.is_loopback or options.insecure:
        return
    if listening:
        raise UsageError(
            f"{address} is plain TCP: whoever reaches it can send a guest here, and whoever listens on the way sees "
            "its memory. Use `amig receive --pair`, tls:// with certificates, or `amig migrate NAME ssh://HOST/NAME` "
            "from the other side, which needs nothing here; --insecure on a network that you trust"
        )
    raise UsageError(
        f"{address} is plain TCP: the guest's memory would go out in the clear, to whoever answers there. Use "
        f"ssh://{address.host}/NAME, tls:// with certificates, or the address that `amig receive --pair` shows there; "
        "--insecure on a network that you trust"
    )
