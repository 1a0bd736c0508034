"""Fuzzes: ``python -m tests.fuzz [TARGET …] [--seconds N] [--keep DIR]``; a process for each target, one at a time."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .targets import NAMES

HERE = Path(__file__).parent
CORPUS = HERE.parent / "corpus"
_DONE = re.compile(r"Done (\d+) runs in (\d+) second")


def fuzz(name: str, *, seconds: int, keep: Path) -> bool:
    """Fuzz one target and say what it came to; False with a finding, which is left in ``keep``."""
    found = keep / name
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "tests.fuzz.child", name, str(seconds), str(found), str(CORPUS / name)]
        child = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=HERE.parent.parent, check=False)
        log.seek(0)
        text = log.read()
    done = _DONE.search(text)
    print(f"{name:10} {done[1] if done else '?':>9} executions in {done[2] if done else '?'} s", flush=True)
    if child.returncode:
        print(text[-6000:], f"{name}: a finding; its input is in {found}/ (see docs/fuzzing.md)", sep="\n", flush=True)
    return child.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/fuzz/run", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; all of them by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--keep", type=Path, help="where new inputs and findings are kept; nowhere by default")
    asked = parser.parse_args()
    if unknown := set(asked.targets) - set(NAMES):
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        results = [fuzz(n, seconds=asked.seconds, keep=asked.keep or Path(folder)) for n in asked.targets or NAMES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
