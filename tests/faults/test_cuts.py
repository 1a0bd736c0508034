"""A long migration whose connections are cut at random: the guest's memory is intact, and little goes twice.

On KVM where it is usable. An ordinary run plays a short form, ``pytest -m faults`` the long one whose figures are in
docs/reliability.md. AMIG_FAULT_SEED repeats the places.
"""

from __future__ import annotations

import os
import random
from typing import NamedTuple

import pytest

import amig
from tests.conftest import kvm_problem
from tests.faults.cutting import CuttingRelay, random_cuts
from tests.moving import MIB, alive, homes, hosting, machine_of, receiving, verdict

__all__ = ["homes"]

pytestmark = pytest.mark.usefixtures("homes")
ENGINE = "simulator" if kvm_problem() else "kvm"
SEED = int(os.environ.get("AMIG_FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)


class Moved(NamedTuple):
    """One migration, as it was from outside."""

    passed: int
    """Bytes from source to destination."""
    cuts: int
    result: amig.Result


async def moved(append: str, memory: int, policy: amig.Policy, cuts: list[int]) -> Moved:
    """Move a checking guest through a relay that cuts; it must be intact."""
    async with hosting(append, engine=ENGINE, memory=memory) as source, receiving() as reception:
        host, _, port = reception.address.removeprefix("tcp://").rpartition(":")
        async with CuttingRelay((host, int(port)), cuts) as relay:
            async with amig.Migration(source.name, relay.address, policy) as migration:
                pass
            result = await migration.result()
            await reception.arrived()
            await alive(machine_of(reception.service))
            assert await verdict(machine_of(reception.service)) == 0, "the guest's memory is damaged"
            return Moved(relay.passed, relay.made, result)


@pytest.mark.parametrize("more", [{}, {"streams": 3}, {"delta_cache": 64 * MIB, "compression": "zstd"}], ids=str)
async def test_a_guest_whose_connections_are_cut_arrives_intact(more: dict[str, object]) -> None:
    policy = amig.Policy(bandwidth=60e6, downtime=0.3, timeout=20, on_timeout="switch", **more)  # type: ignore[arg-type]
    cuts = random_cuts(SEED, 4, 20 * MIB)
    came = await moved("workload=check ws=24M rate=20M report=0", 64 * MIB, policy, cuts)
    assert came.cuts == len(cuts), f"AMIG_FAULT_SEED={SEED}"
    assert 1 <= came.result.reconnects <= len(cuts)
    assert came.result.verified == "digests"


@pytest.mark.faults
@pytest.mark.timeout(1800)
async def test_cut_at_random_it_sends_at_most_a_tenth_more(capsys: pytest.CaptureFixture[str]) -> None:
    """512 MiB that the guest writes all over, a link of 40 MB/s: about 20 s. Undisturbed and cut take turns."""
    append = "workload=check ws=480M rate=4M report=0"
    policy = amig.Policy(bandwidth=40e6, downtime=0.3, timeout=60, on_timeout="switch")
    plain: list[Moved] = []
    cut: list[Moved] = []
    for turn in range(3):
        plain.append(await moved(append, 512 * MIB, policy, []))
        cut.append(await moved(append, 512 * MIB, policy, random_cuts(SEED + turn, 5, 480 * MIB)))
        with capsys.disabled():
            for name, one in (("plain", plain[-1]), ("cut", cut[-1])):
                r = one.result
                print(
                    f"\n{ENGINE} {name}: {one.passed / MIB:.1f} MiB passed, {one.cuts} cuts, {r.reconnects} returns, "
                    f"{r.rounds} rounds, {r.total_ms / 1e3:.1f} s, downtime {r.downtime_ms} ms, seed {SEED + turn}",
                    end="",
                )
    assert sum(one.cuts for one in cut) == 15
    assert sum(one.passed for one in cut) < 1.1 * sum(one.passed for one in plain), f"AMIG_FAULT_SEED={SEED}"
