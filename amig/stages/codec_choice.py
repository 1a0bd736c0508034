"""Whether compressing pays: decided block by block from what was measured, so that it never slows a migration."""

from __future__ import annotations

import threading

from amig.policy import Compression
from amig.stats import LinkMeter

_PROBE_EVERY = 32
"""With compression off, one block in so many is compressed all the same, to see whether the content has changed."""


class CodecChoice:
    """``none`` never compresses, ``zstd`` always, ``auto`` while the compressed path carries more than the raw one.

    The raw path carries what the link does. The compressed path carries the least of what the workers compress and what
    the link does times the ratio. Thread-safe.
    """

    def __init__(self, mode: Compression, level: int, workers: int, link: LinkMeter) -> None:
        self.mode = mode
        self.level = level
        self._workers = workers
        self._link = link
        self._lock = threading.Lock()
        self._ratio = 0.0
        self._speed = 0.0
        self._since_probe = 0

    def compress(self) -> bool:
        """Return whether to compress the next block."""
        if self.mode != "auto":
            return self.mode == "zstd"
        with self._lock:
            self._since_probe += 1
            link = self._link.bytes_per_s
            if not self._speed or not link or self._since_probe >= _PROBE_EVERY:
                self._since_probe = 0
                return True
            return min(self._speed * self._workers, link * self._ratio) > link

    def learn(self, *, raw: int, packed: int, seconds: float) -> None:
        """Take in how one block went: bytes before and after, and the seconds it took one worker."""
        if not raw or seconds <= 0:
            return
        with self._lock:
            weight = 0.25 if self._speed else 1.0
            self._ratio += weight * (raw / max(packed, 1) - self._ratio)
            self._speed += weight * (raw / seconds - self._speed)
