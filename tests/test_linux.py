"""A stock Linux: boots to a shell on the serial console and goes on in another machine."""

from __future__ import annotations

import gzip
import os
import re
import shutil
from pathlib import Path

import pytest

from amig.host.boot import BootConfig
from amig.host.kvm_machine import KvmMachine, MachineConfig
from tests.images import cpio
from tests.machines import MIB, eventually, move

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]

DIRECTORY, FILE, CHARACTER = 0o040755, 0o100755, 0o020600

INIT = b"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
echo "up with $(/bin/busybox grep -c ^processor /proc/cpuinfo) processors"
exec /bin/busybox setsid /bin/busybox cttyhack /bin/busybox sh
"""
APPEND = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr PS1=amig#"


def kernel():
    """A kernel as the distribution ships it."""
    found = [Path(p) for p in (os.environ.get("AMIG_TEST_VMLINUZ", ""), "/boot/vmlinuz") if p and Path(p).is_file()]
    found += sorted(Path("/boot").glob("vmlinuz-*"))
    if not found:
        pytest.skip("no kernel: set AMIG_TEST_VMLINUZ to a bzImage")
    return found[0]


@pytest.fixture(scope="module")
def initrd(tmp_path_factory):
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("no busybox: install busybox-static")
    files = dict.fromkeys(("bin", "dev", "proc", "sys"), (DIRECTORY, b""))
    files |= {
        "bin/busybox": (FILE, Path(busybox).read_bytes()),
        "dev/console": (CHARACTER, (5, 1)),
        "dev/ttyS0": (CHARACTER, (4, 64)),
        "init": (FILE, INIT),
    }
    path = tmp_path_factory.mktemp("linux") / "initrd"
    path.write_bytes(gzip.compress(cpio(files), 1))
    return path


class Session:
    """A person at the console."""

    def __init__(self):
        self.out = bytearray()
        self.machine = None
        self.seen = 0
        self.asked = 0

    def wait_for(self, text, timeout=100):
        def there():
            return self.out.find(text, self.seen)

        try:
            at = eventually(lambda: there() + 1, timeout)
        except AssertionError:
            raise AssertionError(f"no {text!r} after:\n{bytes(self.out[-4000:]).decode(errors='replace')}") from None
        self.seen = at + len(text) - 1

    def ask(self, command):
        """Type a command; returns what it printed."""
        self.asked += 1
        self.machine.serial_input(f"{command}; echo e''nd{self.asked}\n".encode())
        start = self.seen
        self.wait_for(b"end%d\r\n" % self.asked)
        return bytes(self.out[start : self.seen]).decode(errors="replace")


@pytest.fixture
def boot(initrd):
    machines = []

    def start(vcpus, append=APPEND):
        session = Session()
        config = MachineConfig(memory=256 * MIB, vcpus=vcpus)
        machine = KvmMachine.boot(
            config, BootConfig(kernel=kernel(), initrd=initrd, append=append), sink=session.out.extend
        )
        machines.append(machine)
        session.machine = machine
        session.ends = []
        machine.on_stopped = session.ends.append
        machine.resume()
        session.wait_for(b"up with ")
        return session

    yield start, machines
    for machine in machines:
        machine.close()


COMPLAINTS = "BUG:|Oops|Kernel panic|soft lockup|general protection|Call Trace|detected stall"
LOOK = "dmesg | grep -E '{}'".format("|".join(f"[{word[0]}]{word[1:]}" for word in COMPLAINTS.split("|")))
"""Asked in the guest, for the whole log over a serial port takes a minute on an emulated host. The brackets keep the
command itself, which the terminal echoes, from being found."""


def bad_lines(log):
    return re.findall(f".*(?:{COMPLAINTS}).*", log)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_debians_kernel_boots_to_a_shell_and_powers_off(boot, vcpus):
    start, _ = boot
    session = start(vcpus)
    session.wait_for(b"%d processors" % vcpus)
    assert "42" in session.ask("echo $((6*7))")
    assert "KVM" in session.ask("dmesg | grep Hypervisor")
    assert not bad_lines(session.ask(LOOK))
    assert "ttyS0" in session.ask("cat /proc/interrupts"), "the console is driven by its interrupt"
    session.machine.serial_input(b"poweroff -f\n")
    eventually(lambda: session.ends)
    assert session.ends == [None]


def test_a_reboot_ends_the_machine_in_good_order(boot):
    start, _ = boot
    session = start(1)
    session.machine.serial_input(b"reboot -f\n")
    eventually(lambda: session.ends)
    assert session.ends == [None]


@pytest.mark.soak
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_shell_session_goes_on_in_another_machine(boot, vcpus):
    start, machines = boot
    session = start(vcpus)
    session.ask("stty -echo")
    session.ask("n=1; (while true; do echo $((i++)) >/tick; done) & true")
    for round_ in range(2):
        session.machine.pause()
        session.machine.serial_input(b"echo typed w''hile $n\n")
        machine = move(session.machine, sink=session.out.extend)
        machines.append(machine)
        session.machine = machine
        machine.resume()
        session.wait_for(b"typed while %d" % (round_ + 1))
        session.ask("n=$((n+1)); cat /tick")
        before = session.ask("cat /tick; sleep 1")
        assert session.ask("cat /tick") != before
    assert not bad_lines(session.ask(LOOK))
