"""What a fuzz target is: a function that takes any bytes, and what may become of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where files are made for an input: thousands a second."""
Mutate = Callable[[bytes, int], bytes]
"""Changes bytes somehow; the result is at most so many bytes long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """``run`` returns for what was taken and for what was refused by an `AmigError`; what it raises is a finding."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[tuple[str, bytes]]]
    """Names and valid inputs to start from; the same ones each time."""
    most: int
    """Bytes in the longest input that is tried."""
    memory: int
    """Bytes that one input may make the target allocate at its peak, whatever it claims."""
    mutate: Callable[[bytes, int, int, Mutate], bytes] | None = None
    """Takes input, most bytes, a seed and the fuzzer's own mutator: keeps lengths and checksums right, where a change
    would otherwise be refused for them only."""
    words: tuple[bytes, ...] = ()
    """For the fuzzer's dictionary."""
