"""Adds to the corpus what is worth it: ``python -m tests.fuzz.pick TARGET DIR``, of the inputs that a long run kept.

Smallest first, an input is taken when it reaches a line of amig, or a step from one line to another, that none in the
corpus reaches; up to `ROOM` bytes a target.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from .target import Target
from .targets import target

CORPUS = Path(__file__).parent.parent / "corpus"
ROOM = 24 << 10
_AMIG = str(Path(__file__).parent.parent.parent / "amig")

Step = tuple[str, int, int]


def steps(fuzzed: Target, data: bytes) -> set[Step]:
    """Return which lines of amig followed which while an input was run."""
    found: set[Step] = set()

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(_AMIG):
            return None
        before = 0

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal before
            if event == "line":
                found.add((name, before, frame.f_lineno))
                before = frame.f_lineno
            return line

        return line

    threading.settrace(enter)
    sys.settrace(enter)
    try:
        fuzzed.run(data)
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    return found


def main(name: str, kept: str) -> None:
    logging.disable(logging.CRITICAL)
    fuzzed = target(name)
    folder = CORPUS / name
    known: set[Step] = set()
    room = ROOM
    for path in sorted(folder.iterdir()):
        known |= steps(fuzzed, path.read_bytes())
        room -= path.stat().st_size if path.name.startswith("found-") else 0
    for path in sorted(Path(kept).iterdir(), key=lambda path: path.stat().st_size):
        data = path.read_bytes()
        if len(data) > room:
            break
        new = steps(fuzzed, data) - known
        if new:
            known |= new
            room -= len(data)
            (folder / f"found-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
