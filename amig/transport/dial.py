"""`Dialer`: connects to one peer, as often as needed, and makes sure that it is one and the same."""

from __future__ import annotations

import hmac

from amig.errors import Untrusted, UsageError
from amig.transport import ssh, tcp, tls, unix
from amig.transport.address import PairAddress, PeerAddress, SshAddress, TcpAddress, TlsAddress, UnixAddress, parse_peer
from amig.transport.base import Connection
from amig.transport.options import LinkOptions, check_plain
from amig.transport.pairing import PairingSource


class Dialer:
    """Reaches the peer at an address. Every connection must show the certificate that the first has shown."""

    def __init__(self, address: str | PeerAddress, options: LinkOptions | None = None) -> None:
        """Nothing is reached yet. Raises `UsageError` for plain TCP to elsewhere, and for missing certificates."""
        self._where = parse_peer(address) if isinstance(address, str) else address
        self._options = options or LinkOptions()
        self._first: bytes | None = None
        if isinstance(self._where, TcpAddress):
            check_plain(self._where, self._options, listening=False)
        self._pairing = PairingSource(self._where) if isinstance(self._where, PairAddress) else None
        secured = isinstance(self._where, TlsAddress) and self._pairing is None
        self._context = tls.client_context(self._options.tls) if secured else None

    @property
    def address(self) -> str:
        """The peer's address, without a secret."""
        return str(self._where)

    @property
    def max_connections(self) -> int | None:
        """How many connections can be had at once; None: any number."""
        return 1 if isinstance(self._where, SshAddress) else None

    @property
    def parallel(self) -> bool:
        """Whether connections move pages side by side: not where one task encrypts for all (TLS), nor over ssh."""
        return isinstance(self._where, TcpAddress | UnixAddress)

    async def connect(self, *, timeout: float, asking: bool = False) -> Connection:
        """Connect; ``asking`` is for what became of a migration, instead of beginning one.

        Raises `LinkLost`, `Untrusted`, `PeerError`, `Refused`, `HostError` within ``timeout`` seconds.
        """
        connection = await self._connect(timeout, asking)
        if self._first is None:
            self._first = connection.identity
        elif not hmac.compare_digest(self._first, connection.identity):
            connection.abort()
            raise Untrusted(
                f"{self.address} showed another certificate than on the first connection: is there more than one host "
                "behind this name?"
            )
        return connection

    async def _connect(self, timeout: float, asking: bool) -> Connection:
        where = self._where
        if self._pairing is not None:
            return await self._pairing.connect(timeout=timeout)
        if self._context is not None and isinstance(where, TlsAddress):
            return await tls.connect(where, self._context, timeout=timeout)
        if isinstance(where, SshAddress):
            return await ssh.connect(where, self._options, timeout=timeout, asking=asking)
        if isinstance(where, TcpAddress):
            return await tcp.connect(where, timeout=timeout)
        if isinstance(where, TlsAddress):
            raise UsageError(f"{where} can't be reached without certificates")
        return await unix.connect(where, timeout=timeout)
