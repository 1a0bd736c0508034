"""The fuzzers' corpus, played again: valid inputs of each kind, what fuzzing made of them, and all that was a finding.

What fuzzing found once is kept in ``tests/corpus/<target>/finding-*``; docs/fuzzing.md says how to look for more.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import loops, receiver
from tests.fuzz.targets import NAMES, target

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.fixture(scope="module", autouse=True)
def loop() -> Iterator[None]:
    yield
    loops.close()


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_comes_from_outside_is_taken_or_refused_in_bounded_memory(path: Path) -> None:
    fuzzed = target(path.parent.name)
    data = path.read_bytes()
    fuzzed.run(data)  # what is imported or made once is not the input's doing
    gc.collect()
    tracemalloc.start()
    try:
        fuzzed.run(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= fuzzed.memory, f"{len(data)} bytes made it allocate {peak}"


@pytest.mark.parametrize("name", NAMES)
def test_the_seeds_are_made_by_the_script(name: str) -> None:
    """Run ``python -m tests.fuzz.seeds`` when this fails. Their bytes may differ: zstd has versions."""
    assert {path.name for path in (CORPUS / name).glob("seed-*")} == {
        f"seed-{seed}" for seed, _ in target(name).seeds()
    }


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "new"])
async def test_a_seed_is_a_guest_that_arrives(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that are refused at once would fuzz nothing. Run ``python -m tests.fuzz.seeds`` when the kept ones fail."""
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    for name, made in receiver.seeds():
        data = (CORPUS / "receiver" / f"seed-{name}").read_bytes() if kept else made
        guest = await receiver.receive(data)
        assert ("run" in guest.calls) is (name not in ("abort", "query")), name


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in INPUTS) < 512 << 10
    assert {path.parent.name for path in INPUTS} == set(NAMES)
