"""Whether a long run of memory is zero, seen by two threads: half of it each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

from amig.memory import Words
from amig.promptness import be_patient
from amig.stages.gather import all_zero

WORTH_WORDS: Final = 1 << 20
"""Less than 8 MiB is read before a thread has woken up and answered."""


class Scanner:
    """Has a thread of its own for the second half; the caller, who reads the first, waits for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "amig-scan", initializer=be_patient)  # started when first needed

    def all_zero(self, words: Words) -> bool:
        """Whether no bit is set in ``words``."""
        if len(words) < WORTH_WORDS:
            return all_zero(words)
        middle = len(words) // 2
        other = self._thread.submit(all_zero, words[middle:])
        mine = all_zero(words[:middle])
        return other.result() and mine

    def close(self) -> None:
        """End the thread, which has nothing to do. Idempotent."""
        self._thread.shutdown(wait=True)
