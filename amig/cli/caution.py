"""What an operator is warned of."""

from __future__ import annotations

from amig.transport.address import Address, TcpAddress


def plain_tcp(address: Address, command: str) -> str:
    """Return the warning for memory that leaves this machine in the clear, or nothing."""
    if not isinstance(address, TcpAddress) or address.is_loopback:
        return ""
    if command == "receive":
        return (
            f"{address} is not encrypted and not authenticated: whoever can reach it can send a guest here, and "
            "whoever can listen sees its memory. Use a network that you trust, or a tunnel to a loopback address"
        )
    return (
        f"the guest's memory goes to {address} unencrypted, secrets and all, and nothing proves who answers there. Use "
        "a network that you trust, or a tunnel to a loopback address"
    )
