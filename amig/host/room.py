"""How much memory this process may still use: what the machine has free, and what control groups leave of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from amig.host.mapping import HUGE_PAGE

_HUGE_POOL = "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
_MOST_FILE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """``bytes`` that can still be had, and who sets that limit, for people."""

    bytes: int
    limit: str


def room(*, hugepages: bool = False, root: Path = Path("/")) -> Room:
    """Return what is left for guest memory. Source: proc(5) MemAvailable, Linux cgroup-v2.rst and cgroup-v1/memory.rst.

    A figure of this moment: whoever else takes memory later takes it from the same. ``root`` is for tests.
    """
    if hugepages:
        pages = _number(root / _HUGE_POOL) or 0
        return Room(bytes=pages * HUGE_PAGE, limit="free huge pages, vm.nr_hugepages")
    found = [Room(bytes=_available(root), limit="MemAvailable of this machine"), *_groups(root)]
    return min(found, key=lambda r: r.bytes)


def _available(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return 1 << 62  # no figure, no limit


def _groups(root: Path) -> Iterator[Room]:
    """Yield what each memory control group that holds this process leaves."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                yield from _climb(root / mount, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _climb(root / "sys/fs/cgroup/memory", path, *names)


def _climb(mount: Path, path: str, most: str, used: str, cache: str) -> Iterator[Room]:
    """Yield for a group and all groups above it; in a container the path may lie outside of what is mounted."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        group = mount.joinpath(*parts[:depth])
        limit, usage = _number(group / most), _number(group / used)
        if limit is None or usage is None or limit >= 1 << 60:
            continue
        usage -= min(usage, _stat(group / "memory.stat", cache))  # file cache goes when memory is asked for
        yield Room(bytes=max(limit - usage, 0), limit=f"control group /{'/'.join(parts[:depth])}")


def _stat(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            return file.read(_MOST_FILE)
    except OSError:
        return ""
