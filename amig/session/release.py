"""Which release of amig this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    RELEASE = version("amig")
except PackageNotFoundError:  # run from a copy of the source
    RELEASE = "0"
"""As the handshake tells it, for people; nothing is decided by it."""
