"""Writes the seeds of every target anew: ``python -m tests.fuzz.seeds``. They are valid inputs, made by amig itself."""

from __future__ import annotations

from pathlib import Path

from .targets import NAMES, target

CORPUS = Path(__file__).parent.parent / "corpus"


def main() -> None:
    for name in NAMES:
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("seed-*"):
            old.unlink()
        for seed, data in target(name).seeds():
            (folder / f"seed-{seed}").write_bytes(data)


if __name__ == "__main__":
    main()
