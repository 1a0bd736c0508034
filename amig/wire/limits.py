"""Every limit of the wire protocol, in one place; docs/wire-protocol.md repeats the table and a test compares them.

A limit is checked before anything of that size is allocated. Both sides keep to them: a sender that would exceed one
has a bug, a receiver that sees one exceeded raises `PeerError` and drops the connection.
"""

from __future__ import annotations

from typing import Final

from amig import digest
from amig.memory import MAX_REGIONS, PAGE_SIZE, WORD_PAGES

KIB: Final = 1 << 10
MIB: Final = 1 << 20

VERSION: Final = 1
"""Version of the protocol; two sides with different versions refuse each other by name."""

MAX_CONTROL: Final = 64 * KIB
"""Bytes in the payload of a control message, except HELLO."""

MAX_HELLO: Final = 512 * KIB
"""Bytes in the payload of HELLO: it carries the memory map and the machine description."""

MAX_MACHINE: Final = 384 * KIB
"""Bytes in a machine description (CPUID of every vCPU, clocks, devices)."""

MAX_STATE: Final = 32 * MIB
"""Bytes of device and vCPU state in all, over all its parts."""

MAX_STATE_PART: Final = 1 * MIB
"""Bytes of state in one STATE frame."""

MAX_BLOCK_PAGES: Final = 1024
"""Pages with data in one block."""

MAX_BLOCK_DATA: Final = MAX_BLOCK_PAGES * PAGE_SIZE
"""Bytes of page data in one block, as sent and as decompressed."""

MAX_BLOCK_SPAN: Final = 1 << 19
"""Pages between the first and the last page a block may speak of."""

MAX_BITMAP: Final = MAX_BLOCK_SPAN // WORD_PAGES * 8
"""Bytes in each of the two bitmaps of a block."""

MAX_STREAMS: Final = 64
"""Connections of one migration, stream 0 included."""

MAX_ROUND: Final = 1_000_000
"""Highest round number."""

MAX_REGION_COUNT: Final = MAX_REGIONS
"""Memory regions of a guest."""

MAX_REGION_ID: Final = 2**32 - 1
"""Highest memory region id."""

MAX_VCPUS: Final = 4096
"""vCPUs of a guest."""

MAX_FEATURES: Final = 64
"""Names in each list of features."""

MAX_NAME: Final = 128
"""Characters in a name: of a guest, a feature, an engine, a release, an error code."""

MAX_TEXT: Final = 2000
"""Characters in a reason or an identity."""

MAX_TOKEN: Final = 64
"""Bytes in the token that further connections show."""

MAX_DIGEST: Final = 64
"""Bytes in a digest."""

MAX_ROOT_BYTES: Final = 8 * digest.MAX_ROOTS
"""Bytes of roots in END."""

MAX_PAGE_DIGESTS: Final = 4096
"""Pages in a DIGESTS message."""

MAX_HELD_BYTES: Final = 32 * KIB
"""Bytes of the bitmap in a HELD message: 1 GiB of guest memory."""
