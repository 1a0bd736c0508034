"""What an operator is warned of."""

from __future__ import annotations

from amig.transport import LinkOptions, check_plain
from amig.transport.address import TcpAddress, parse


def plain_tcp(text: str, link: LinkOptions, *, listening: bool) -> str:
    """Return the warning for memory that leaves this machine in the clear, or nothing.

    Raises `UsageError` where that was not asked for with ``--insecure``, and for what is no address.
    """
    address = parse(text)
    if not isinstance(address, TcpAddress) or address.is_loopback:
        return ""
    check_plain(address, link, listening=listening)
    if listening:
        return (
            f"{address} is not encrypted and not authenticated: whoever can reach it can send a guest here, and "
            "whoever can listen sees its memory. Use a network that you trust"
        )
    return (
        f"the guest's memory goes to {address} unencrypted, secrets and all, and nothing proves who answers there. Use "
        "a network that you trust"
    )
