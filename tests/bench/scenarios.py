"""What is compared: the scenarios T1 to T9 as data. One workload line, memory, link and limits for both sides."""

from __future__ import annotations

from dataclasses import dataclass, field

from amig.memory import PAGE_SIZE

GIB, MIB = 1 << 30, 1 << 20
OWN = 8 * MIB
"""What the guest's image and the firmware keep of its memory: the rest can be filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to move the guest."""

    name: str
    side: str
    """``amig``, ``qemu`` or ``iperf3``."""
    words: tuple[str, ...] = ()
    """amig: further words of `amig migrate`."""
    streams: int | None = None
    """amig: connections, if not those of the scenario."""
    cache: int = 0
    """amig: bytes of its delta cache, which T8 leaves apart."""
    multifd: bool = False
    compression: str = "none"
    """Of multifd."""
    xbzrle: bool = False
    auto_converge: bool = False


AMIG = Mode(name="amig", side="amig")
AMIG_OPEN = Mode(name="amig, no digests", side="amig", words=("--verify", "off"))
"""What QEMU does, which compares nothing."""
AMIG_ZSTD = Mode(name="amig zstd", side="amig", words=("--compression", "zstd"))
AMIG_DELTA = Mode(name="amig delta", side="amig", words=("--delta-cache", str(1400 * MIB)), cache=1400 * MIB)
AMIG_AUTO = Mode(name="amig auto", side="amig", words=("--compression", "auto"))
PLAIN = Mode(name="QEMU plain", side="qemu")
MULTIFD = Mode(name="QEMU multifd", side="qemu", multifd=True)
MULTIFD_ZSTD = Mode(name="QEMU multifd+zstd", side="qemu", multifd=True, compression="zstd")
XBZRLE = Mode(name="QEMU xbzrle", side="qemu", xbzrle=True)
CONVERGE = Mode(name="QEMU auto-converge", side="qemu", auto_converge=True)
MULTIFD_CONVERGE = Mode(name="QEMU multifd, auto-converge", side="qemu", multifd=True, auto_converge=True)
IPERF = Mode(name="iperf3", side="iperf3")

BEST = "QEMU's best"
FLUID = "the fluid limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure of one mode by the same figure of another, pair by pair; the median is to be ``at_most``."""

    ours: Mode
    theirs: str
    """A mode's name, `BEST` (the QEMU mode whose median is least) or `FLUID`."""
    at_most: float
    figure: str = "total_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One guest, one link, and who moves it."""

    name: str
    title: str
    memory: int
    """Bytes."""
    words: str
    """The guest's command line."""
    link: int | None = None
    """Bytes a second at most."""
    downtime: float = 0.1
    """Seconds."""
    streams: int = 2
    working_set: int = 0
    """Bytes that are written at random."""
    modes: tuple[Mode, ...] = ()
    targets: tuple[Target, ...] = ()
    limit: float = 60.0
    """Seconds after which a run counts as one that does not end."""
    preallocated: tuple[bool, ...] = (False, True)
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def pages(self) -> int:
        """Of the guest."""
        return self.memory // PAGE_SIZE

    @property
    def line(self) -> str:
        """The whole command line: both sides spin, for QEMU has no port to wait at."""
        return f"{self.words} tick_us=200 report=0 spin=1"


def _published(name: str, content: str, fill: str) -> Scenario:
    return Scenario(
        name=name,
        title=f"the published scenario at a tenth, content {content}",
        memory=1400 * MIB,
        words=f"workload=random ws=1GiB rate=900MB/s write=byte fill={fill}",
        link=1_250_000_000,
        downtime=0.01,
        working_set=GIB,
        modes=(AMIG, AMIG_OPEN, AMIG_DELTA, PLAIN, MULTIFD, MULTIFD_ZSTD, XBZRLE, CONVERGE),
        targets=(
            Target(ours=AMIG, theirs=BEST, at_most=0.4),
            Target(ours=AMIG, theirs=FLUID, at_most=1.2),
            Target(ours=AMIG_DELTA, theirs=BEST, at_most=0.25),
            Target(ours=AMIG_DELTA, theirs=FLUID, at_most=1.0),
        ),
    )


def _text(name: str, title: str, link: int | None, modes: tuple[Mode, ...], targets: tuple[Target, ...]) -> Scenario:
    return Scenario(
        name=name,
        title=title,
        memory=2 * GIB,
        words=f"workload=idle ws=64MiB fill=text fill_size={2 * GIB - OWN}",
        link=link,
        modes=modes,
        targets=targets,
        limit=120.0,
    )


def _hot_spot(name: str, write: str) -> Scenario:
    return Scenario(
        name=name,
        title=f"hot spot: 90 % of writes on 10 % of pages, one {write} a write, faster than the link",
        memory=1400 * MIB,
        words=f"workload=hotspot hot=90:10 ws=1GiB rate=900MB/s write={write} fill=random",
        link=300_000_000,
        working_set=GIB,
        modes=(AMIG_DELTA, CONVERGE, MULTIFD_CONVERGE),
        targets=(Target(ours=AMIG_DELTA, theirs=BEST, at_most=0.5),),
    )


def _idle(name: str, title: str, size: int, words: str) -> Scenario:
    return Scenario(
        name=name,
        title=title,
        memory=size,
        words=f"workload=idle ws=64MiB {words}",
        modes=(AMIG, PLAIN, MULTIFD),
        targets=(Target(ours=AMIG, theirs=BEST, at_most=1.0),),
    )


def _grown(gib: int) -> Scenario:
    return Scenario(
        name=f"T9-{gib}",
        title=f"growth: idle, {gib} GiB, all touched",
        memory=gib * GIB,
        words=f"workload=idle ws=64MiB fill=random fill_size={gib * GIB - OWN}",
        modes=(AMIG, MULTIFD),
        tags=frozenset({"growth"}),
    )


SCENARIOS: tuple[Scenario, ...] = (
    _published("T1-random", "random", "random"),
    _published("T1-mixed", "half random, half constant", "mixed"),
    Scenario(
        name="T2",
        title="idle, 4 GiB of random content, no cap",
        memory=4 * GIB,
        words=f"workload=idle ws=64MiB fill=random fill_size={4 * GIB - OWN}",
        modes=(AMIG, AMIG_OPEN, PLAIN, MULTIFD, IPERF),
        targets=(
            Target(ours=AMIG, theirs=PLAIN.name, at_most=1 / 1.5),
            Target(ours=AMIG, theirs=MULTIFD.name, at_most=1.0),
            Target(ours=AMIG, theirs=IPERF.name, at_most=1 / 0.8),
        ),
    ),
    _idle("T3-zero", "idle, 8 GiB, all zero and touched", 8 * GIB, f"fill=zero fill_size={8 * GIB - OWN}"),
    _idle("T3-untouched", "idle, 8 GiB, never touched", 8 * GIB, "fill=none"),
    _idle("T3-half", "idle, 8 GiB, half of it zero", 8 * GIB, f"fill=random fill_size={4 * GIB}"),
    _text(
        "T4",
        "idle, 2 GiB of text-like content, link capped",
        125_000_000,
        (AMIG_ZSTD, AMIG_AUTO, MULTIFD_ZSTD),
        (
            Target(ours=AMIG_ZSTD, theirs=MULTIFD_ZSTD.name, at_most=1.0),
            Target(ours=AMIG_ZSTD, theirs=MULTIFD_ZSTD.name, at_most=1.0, figure="cpu_s"),
        ),
    ),
    _text(
        "T5",
        "idle, 2 GiB of text-like content, no cap",
        None,
        (AMIG, AMIG_AUTO, MULTIFD, MULTIFD_ZSTD),
        (Target(ours=AMIG_AUTO, theirs=AMIG.name, at_most=1.1),),
    ),
    _hot_spot("T6-page", "page"),
    _hot_spot("T6-byte", "byte"),
    *(_grown(gib) for gib in (1, 2, 4, 8)),
)


def choose(words: list[str]) -> list[Scenario]:
    """Return what the words name: a scenario, all that go on after a hyphen, or ``all``. Raises `ValueError`.

    T7 and T8 are columns of every table, so they are all.
    """
    found: list[Scenario] = []
    for word in words:
        every = word in ("all", "T7", "T8")
        some = [s for s in SCENARIOS if every or s.name == word or s.name.startswith(f"{word}-")]
        if not some:
            raise ValueError(f"there is no scenario {word}: all, {', '.join(s.name for s in SCENARIOS)}")
        found += [s for s in some if s not in found]
    return found
