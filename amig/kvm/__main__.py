"""``python -m amig.kvm`` says what KVM is here; it ends with the error's exit code where none is usable."""

from __future__ import annotations

import sys
from pathlib import Path

from amig.errors import KvmError
from amig.kvm.abi_numbers import Cap
from amig.kvm.system import Kvm


def main() -> int:
    """Print capabilities that amig cares about."""
    modules = sorted(p.name for p in Path("/sys/module").glob("kvm_*"))
    try:
        with Kvm.open() as kvm:
            found = {
                "module": ", ".join(modules) or "built in",
                "manual dirty-log protect": kvm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2),
                "dirty ring, bytes": kvm.check_extension(Cap.DIRTY_LOG_RING),
                "TSC scaling": kvm.check_extension(Cap.TSC_CONTROL),
                "CPUID entries": len(kvm.supported_cpuid()),
            }
    except KvmError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{what}: {value}\n" for what, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
