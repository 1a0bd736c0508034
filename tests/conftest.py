"""Which KVM is here, said at the top of every run, and the tests that need it held back where there is none.

No `/dev/kvm`: tests marked ``kvm`` are skipped with the reason. A `/dev/kvm` that is there but unusable, or none while
AMIG_REQUIRE_KVM=1, makes them fail: a machine that ought to test KVM must not look as if it had.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says more about what else the machine does than about us.
settings.register_profile("amig", deadline=None)
settings.load_profile("amig")

DEVICE = Path("/dev/kvm")


@functools.cache
def kvm_problem() -> str | None:
    """Why KVM can't be used here, or None."""
    from amig.errors import KvmError
    from amig.kvm.system import Kvm

    try:
        Kvm.open().close()
    except KvmError as error:
        return str(error)
    return None


def kvm_modules() -> list[str]:
    return sorted(p.name for p in Path("/sys/module").glob("kvm_*"))


def standard_kvm() -> bool:
    """Whether guests run in hardware here; a software KVM interprets ring 0 and can't run Linux."""
    return bool({"kvm_amd", "kvm_intel"} & set(kvm_modules()))


def pytest_report_header() -> str:
    from amig.kvm.abi_numbers import Cap
    from amig.kvm.system import Kvm

    if problem := kvm_problem():
        return f"kvm: none ({problem})"
    with Kvm.open() as kvm:
        manual = kvm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2)
        ring = kvm.check_extension(Cap.DIRTY_LOG_RING)
    nested = [
        f"{m} nested={p.read_text().strip()}"
        for m in kvm_modules()
        if (p := Path("/sys/module") / m / "parameters/nested").exists()
    ]
    kind = "standard" if standard_kvm() else "nested in software: no Linux guests"
    modules = ", ".join(nested or kvm_modules()) or "built in"
    return f"kvm: {modules} ({kind}), manual protect {manual}, dirty ring {ring}"


def pytest_collection_finish() -> None:
    # By now all tests and all of amig are loaded, to stay: many tests search for what they left, and each search would
    # go through all that in vain, for a tenth of a second.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    lab = item.get_closest_marker("lab") is not None
    if lab or item.get_closest_marker("kvm") is not None:
        if problem := kvm_problem():
            if DEVICE.exists() or os.environ.get("AMIG_REQUIRE_KVM") == "1":
                pytest.fail(f"KVM is required here but can't be used: {problem}", pytrace=False)
            pytest.skip(problem)
        if lab and not standard_kvm():
            pytest.skip(f"needs a standard KVM; this one is {', '.join(kvm_modules()) or 'built in'}")


@pytest.fixture(autouse=True, scope="session")
def one_connection() -> Iterator[None]:
    """Where a test leaves the number of connections open it gets one, whatever processors the machine has."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("amig.policy.MOST_CHOSEN", 1)
        yield
