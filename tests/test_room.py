"""How much memory is left, read from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from amig.host.room import room

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal:  33554432 kB\nMemFree: 1 kB\nMemAvailable:   16777216 kB\n"}
V2 = {
    "proc/self/cgroup": "0::/user.slice/amig.scope\n",
    "sys/fs/cgroup/user.slice/memory.max": str(8 * GIB),
    "sys/fs/cgroup/user.slice/memory.current": str(3 * GIB),
    "sys/fs/cgroup/user.slice/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    "sys/fs/cgroup/user.slice/amig.scope/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/amig.scope/memory.current": "4096\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "4096\n",
    "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": str(2 * GIB),
    "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": str(GIB),
    "sys/fs/cgroup/memory/docker/abc/memory.stat": "total_inactive_file 0\n",
}


@pytest.mark.parametrize(
    ("files", "left", "limit"),
    [
        (MACHINE, 16 * GIB, "MemAvailable"),
        (MACHINE | V2, 6 * GIB, "control group /user.slice"),
        (MACHINE | V1, GIB, "control group /docker/abc"),
        (MACHINE | {"proc/self/cgroup": "0::/../elsewhere\n", "sys/fs/cgroup/memory.max": "max"}, 16 * GIB, "MemAv"),
        ({}, 1 << 62, "MemAvailable"),
    ],
    ids=["machine", "cgroup-2", "cgroup-1", "no-limit", "no-figures"],
)
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], left: int, limit: str) -> None:
    found = room(root=write(tmp_path, files))
    assert found.bytes == left
    assert found.limit.startswith(limit)


def test_huge_pages_are_a_pool_of_their_own(tmp_path: Path) -> None:
    pool = {"sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "3\n"}
    assert room(hugepages=True, root=write(tmp_path, MACHINE | pool)).bytes == 6 << 20
    assert room(hugepages=True, root=tmp_path / "nowhere").bytes == 0


def test_this_machine_has_some() -> None:
    assert 0 < room().bytes < 1 << 62
