"""The words on the command line of amig's own guest image, from options."""

from __future__ import annotations

from amig.cli import options
from amig.errors import UsageError

WORKLOADS = ("idle", "fill", "sequential", "random", "hotspot", "check")


def words(
    workload: str,
    *,
    working_set: str | None = None,
    rate: str | None = None,
    write: str | None = None,
    fill: str | None = None,
    hot: str | None = None,
    seed: int | None = None,
) -> str:
    """Return the words; values are checked here where they can be, else by the guest. Raises `UsageError`."""
    if workload not in WORKLOADS:
        raise UsageError(f"--workload {workload}: there are {', '.join(WORKLOADS)}")
    parts = [f"workload={workload}"]
    if working_set is not None:
        parts.append(f"ws={options.size('--working-set', working_set)}")
    if rate is not None:
        parts.append(f"rate={options.rate('--rate', rate) or 0}")
    for key, value in (("write", write), ("fill", fill), ("hot", hot), ("seed", seed)):
        if value is not None:
            parts.append(f"{key}={value}")
    return " ".join(parts)
