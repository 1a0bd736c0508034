"""Which release of amig this is: the build takes it from here, since looking it up costs every start 30 ms."""

from __future__ import annotations

RELEASE = "0.1.0"
"""As the handshake tells it, for people; nothing is decided by it."""
