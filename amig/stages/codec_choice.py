"""Whether compressing pays: decided block by block from what was measured, so that it never slows a migration."""

from __future__ import annotations

import threading

from amig.policy import Compression
from amig.stats import LinkMeter

SAMPLE_EVERY = 8
"""With compression off, a little of one block in so many is compressed all the same: the content may have changed."""
SAMPLE_PAGES = 32
"""How much: 128 KiB tell the ratio within a few percent, and take a worker less than a millisecond."""


class CodecChoice:
    """``none`` never compresses, ``zstd`` always, ``auto`` while the compressed path carries more than the raw one.

    The raw path carries what the link does. The compressed path carries the least of what the workers compress and what
    the link does times the ratio. What is not known yet is not compressed: samples make it known. Thread-safe.
    """

    def __init__(self, mode: Compression, level: int, workers: int, link: LinkMeter) -> None:
        self.mode = mode
        self.level = level
        self._workers = workers
        self._link = link
        self._lock = threading.Lock()
        self._ratio = 0.0
        self._speed = 0.0
        self._since_sample = SAMPLE_EVERY - 1  # so that the first block is one

    def compress(self) -> bool:
        """Return whether to compress the next block."""
        if self.mode != "auto":
            return self.mode == "zstd"
        with self._lock:
            link = self._link.bytes_per_s
            return 0 < link < min(self._speed * self._workers, link * self._ratio)

    def sample(self) -> bool:
        """Return whether a little of this block, which will go as it is, should be compressed and told to `learn`."""
        if self.mode != "auto":
            return False
        self._since_sample = (self._since_sample + 1) % SAMPLE_EVERY
        return self._since_sample == 0

    def learn(self, *, raw: int, packed: int, seconds: float) -> None:
        """Take in how one block went: bytes before and after, and the seconds it took one worker."""
        if not raw or seconds <= 0:
            return
        with self._lock:
            weight = 0.25 if self._speed else 1.0
            self._ratio += weight * (raw / max(packed, 1) - self._ratio)
            self._speed += weight * (raw / seconds - self._speed)
