"""The published scenario at a scale of one's choice, and the ways to log that it is run with. Pure.

Peter Xu, 2019 ("kvm/migration: support KVM_CLEAR_DIRTY_LOG"): a guest of 13 GB, 10 GB of it written at random at
900 MB/s, one byte a page; a link of 10 Gbit/s; 100 ms of downtime. Sizes and downtime are scaled, rates are not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from amig.errors import UsageError
from amig.memory import PAGE_SIZE
from amig.policy import Policy

GIB, MIB = 1 << 30, 1 << 20
PUBLISHED_SECONDS = {"auto-clear": 58, "1GiB": 40, "128MiB": 38, "16MiB": 39, "1MiB": 38}
"""His total times: no clear log, and chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One guest and one link."""

    memory: int
    """Bytes."""
    working_set: int
    """Bytes that are written at random."""
    rate: int
    """Bytes of pages a second that the guest is asked to write."""
    link: int
    """Bytes a second at most."""
    downtime: float
    """Seconds."""
    fill_rest: bool = False
    """Whether the memory outside of the working set holds data; else it is never touched."""

    @classmethod
    def published(cls, scale: float) -> Scenario:
        """Return it at ``scale``: 1 is 13 GB. Raises `UsageError`."""
        if not 0.001 <= scale <= 10:
            raise UsageError("a scale lies between 0.001 and 10")
        unit = 2 * MIB
        return cls(
            memory=max(64 * MIB, round(13 * GIB * scale / unit) * unit),
            working_set=max(16 * MIB, round(10 * GIB * scale / unit) * unit),
            rate=900_000_000,
            link=1_250_000_000,
            downtime=0.1 * scale,
        )

    @property
    def pages(self) -> int:
        """Of the working set."""
        return self.working_set // PAGE_SIZE

    def slowed(self, factor: float) -> Scenario:
        """Return it with both rates multiplied, in steps of 5 % downwards; itself for a factor near 1."""
        if factor >= 0.97:
            return self
        steps = max(1, int(factor * 20))
        return replace(self, rate=self.rate * steps // 20, link=self.link * steps // 20)

    @property
    def words(self) -> str:
        """For the guest's command line."""
        fill_size = f" fill_size={self.memory}" if self.fill_rest else ""
        return f"fill=mixed{fill_size} write=byte tick_us=200 report=0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to log."""

    name: str
    strategy: str
    initially_set: bool = True
    ring: int = 0
    """Entries of the dirty ring; 0: none."""
    chunk: int = Policy().chunk
    """Dirty bytes of a chunk, at most; what a migration does unless told otherwise."""
    span: int | None = None
    """Address range of a chunk, at most."""


RING_ENTRIES = 65536
SPANS = {"1GiB": GIB, "128MiB": 128 * MIB, "16MiB": 16 * MIB, "1MiB": MIB, "256KiB": 256 << 10}


def variants(*, every: bool = False) -> tuple[Variant, ...]:
    """Return all that are run, the published ones first; ``every``: fixed spans with each design."""
    manual = ("slot-cache", "exact")
    fixed = (*manual, "auto-clear", "ring") if every else ("slot-cache",)
    found = [Variant(name="auto-clear", strategy="auto-clear")]
    for strategy in fixed:
        ring = RING_ENTRIES if strategy == "ring" else 0
        for word, span in SPANS.items():
            name = f"{strategy}, span {word}"
            found.append(Variant(name=name, strategy=strategy, chunk=GIB, span=span, ring=ring))
    for strategy in manual:
        found.append(Variant(name=strategy, strategy=strategy))
        found.append(Variant(name=f"{strategy}, not initially set", strategy=strategy, initially_set=False))
    found.append(Variant(name="ring", strategy="ring", ring=RING_ENTRIES))
    return tuple(found)


def choose(words: list[str], *, every: bool = False) -> tuple[Variant, ...]:
    """Return the variants whose names begin with one of ``words``, or all. Raises `UsageError`.

    A word that is a whole name means that one only; an end in ``*`` is not needed.
    """
    known = variants(every=every)
    if not words:
        return known
    chosen: list[Variant] = []
    for word in words:
        exact = [v for v in known if v.name == word]
        some = exact or [v for v in known if v.name.startswith(word)]
        if not some:
            raise UsageError(f"--only {word}: there are {'; '.join(v.name for v in known)}")
        chosen += [v for v in some if v not in chosen]
    return tuple(chosen)
