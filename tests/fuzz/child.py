"""Fuzzes one target in this process: ``python -m tests.fuzz.child TARGET SECONDS FOUND-DIR [CORPUS-DIR …]``."""

from __future__ import annotations

import gc
import itertools
import logging
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

from .targets import target

SPARE = 1 << 30
"""Bytes of address space beyond what the fuzzer itself has taken: whoever asks for more gets a MemoryError."""
TIDY = 64
"""Inputs between two collections."""
SLOWEST = 20
"""Seconds that one input may take; a machine that is busy with other things counts, too."""


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def tidy(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Collect garbage now and then: what errors leave behind is large, and of too few objects to have it done."""
    turns = itertools.count(1)

    def tidied(data: bytes) -> None:
        run(data)
        if next(turns) % TIDY == 0:
            gc.collect()

    return tidied


def main(name: str, seconds: str, found: str, *corpora: str) -> None:
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["amig"], enable_loader_override=False):
        chosen = target(name)
        chosen.run(next(iter(chosen.seeds()))[1])  # what is imported late is imported now
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={chosen.most}",
        f"-timeout={SLOWEST}",
        f"-artifact_prefix={found}/finding-",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".dict") as words, tempfile.TemporaryDirectory() as fresh:
        for seed, data in chosen.seeds():  # those in the corpus may be of an older protocol
            Path(fresh, seed).write_bytes(data)
        for word in chosen.words:
            words.write('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n')
        words.flush()
        if chosen.words:
            options.append(f"-dict={words.name}")
        more = {}
        if (by := chosen.mutate) is not None:
            more["custom_mutator"] = lambda data, most, seed: by(bytes(data), most, seed, atheris.Mutate)
        folders = [found, fresh, *(folder for folder in corpora if Path(folder).is_dir())]
        atheris.Setup([sys.argv[0], *options, *folders], tidy(chosen.run), **more)
        _bound_memory()
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
