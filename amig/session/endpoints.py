"""What SRC and DST mean: a guest's name, its control socket, a snapshot file; a peer, or a file."""

from __future__ import annotations

from amig.errors import UsageError
from amig.guest import Guest
from amig.host.attach import open_guest
from amig.policy import Policy
from amig.session.destination import Destination
from amig.session.peer import Peer
from amig.session.snapshot import SnapshotFile
from amig.session.snapshot_guest import SnapshotGuest
from amig.transport import Dialer, LinkOptions
from amig.transport.address import FileAddress, parse


async def open_source(source: str) -> Guest:
    """Connect to the guest that ``source`` names: ``NAME``, a path to its control socket, or ``file:PATH``."""
    if source.startswith("file:"):
        address = parse(source)
        assert isinstance(address, FileAddress)  # noqa: S101 - by its scheme
        return await SnapshotGuest.load(address.path)
    return await open_guest(source, client="amig migrate")


def shown(address: str) -> str:
    """Return an address as it may be shown and kept: without the secret of a pairing."""
    try:
        return str(parse(address))
    except UsageError:
        return address.partition("#")[0]


def open_destination(address: str, policy: Policy, link: LinkOptions | None = None) -> Destination:
    """Return the destination that ``address`` names; nothing is reached yet. Raises `UsageError`."""
    parsed = parse(address)
    if isinstance(parsed, FileAddress):
        if policy.streams not in (None, 1):
            raise UsageError("a snapshot file is one stream: leave --streams out")
        return SnapshotFile(parsed.path)
    dialer = Dialer(parsed, link)
    most = dialer.max_connections
    if most is not None and (policy.streams or 1) > most:
        raise UsageError(f"{dialer.address} is one connection: leave --streams out, or use tls://")
    return Peer(
        dialer,
        connect_timeout=policy.connect_timeout,
        handover_timeout=policy.handover_timeout,
        keepalive=policy.keepalive,
        stall=policy.stall,
    )
