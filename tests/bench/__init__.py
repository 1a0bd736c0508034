"""amig beside QEMU, on the same guest: ``python -m tests.bench.versus_qemu``."""
