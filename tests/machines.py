"""Small helpers around `KvmMachine`: guests of a few instructions, and waiting for what they do."""

import time

import numpy as np

from amig.host import guest_abi
from amig.host.boot import BootConfig
from amig.host.images import image_path
from amig.host.kvm_machine import KvmMachine, MachineConfig
from tests.images import LOAD, NOTE, amig_note, elf_file, pvh_note

MIB = 1 << 20
ENTRY = MIB

# 32-bit code, entered with paging off.
KEYBOARD_RESET = bytes.fromhex("b0fe e664 f4 ebfd")
CF9_RESET = bytes.fromhex("baf90c0000 b006 ee f4 ebfd")
POWER_OFF = bytes.fromhex("ba04060000 66b80034 66ef f4 ebfd")
TRIPLE_FAULT = bytes.fromhex("0f011d00500000 0f0b")  # an empty interrupt table, then an invalid instruction
NOT_EMULATED = bytes.fromhex("d905000000d0")  # a floating-point load from where no memory is
SPIN = bytes.fromhex("ebfe")
ECHO = bytes.fromhex("bafd030000 ec a801 74fb baf8030000 ec 3420 ee ebeb")  # COM1, polled, upper and lower case swapped


COUNTER = 0x5000
_COUNT = bytes.fromhex("ff0500500000 ebf8")  # for further vCPUs: count at COUNTER for ever
_WAIT_FOR_COUNT = bytes.fromhex("833d0050000000 74f7")


def two_sided(tmp_path, *, wait):
    """Write an image whose vCPU 0 resets the machine (``wait``: once the others count) while the others count."""
    first = (_WAIT_FOR_COUNT if wait else b"") + KEYBOARD_RESET
    notes = pvh_note(ENTRY) + amig_note(ENTRY + 0x100)
    path = tmp_path / "two-sided.elf"
    code = first.ljust(0x100, b"\xf4") + _COUNT
    path.write_bytes(elf_file((LOAD, ENTRY, 4096, 4096, code), (NOTE, 0, len(notes), 4, notes)))
    return path


def count(machine):
    return machine.memory.read(COUNTER, 8)


def stands_still(machine, look_again=0.1):
    """Whether nobody counts while we look."""
    before = count(machine)
    time.sleep(look_again)
    return count(machine) == before


def eventually(condition, timeout=30.0, what=""):
    """Wait until ``condition()`` is true; returns what it returned."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, what or "this did not happen in time"
        time.sleep(0.005)
    return result


def tiny(tmp_path, code):
    """Write a PVH image of a few instructions."""
    note = pvh_note(ENTRY)
    path = tmp_path / "tiny.elf"
    path.write_bytes(elf_file((LOAD, ENTRY, 4096, 4096, code), (NOTE, 0, len(note), 4, note)))
    return path


def boot(append="workload=idle", *, kernel=None, memory=64 * MIB, vcpus=1, sink=None, **more):
    config = MachineConfig(memory=memory, vcpus=vcpus, **more)
    request = BootConfig(kernel=kernel or image_path(), append=append)
    return KvmMachine.boot(config, request, **({"sink": sink} if sink else {}))


def raw(machine):
    return machine.memory.pages(0).reshape(-1)


def cpus(machine):
    """The guest image's blocks of all vCPUs, as they are now."""
    return guest_abi.parse_cpus(raw(machine), machine.vcpus)


def heartbeats(machine):
    return cpus(machine)["heartbeat"].copy()


def wait_running(machine):
    """Wait until the guest image has filled its memory and works."""
    eventually(lambda: guest_abi.present(raw(machine)), what="the guest never filled in its status page")
    eventually(lambda: guest_abi.parse_status(raw(machine))["state"] == guest_abi.State.RUNNING)
    wait_heartbeats(machine)


def wait_heartbeats(machine):
    """Wait until every vCPU's heartbeat has advanced."""
    before = heartbeats(machine)
    eventually(lambda: (heartbeats(machine) > before).all(), what="a vCPU's heartbeat stands still")


def copy_memory(source, destination):
    for region in source.memory.map.regions:
        for first, count in source.memory.data_ranges(region.id, 0, region.pages):
            destination.memory.pages(region.id)[first : first + count] = source.memory.pages(region.id)[
                first : first + count
            ]


def move(source, *, sink=None):
    """Build a machine like ``source``, which is paused for good, and give it all that ``source`` has."""
    source.pause()
    state = source.save()
    destination = KvmMachine.build_like(source.describe(), source.memory.map, **({"sink": sink} if sink else {}))
    try:
        copy_memory(source, destination)
        destination.load(state)
    except BaseException:
        destination.close()
        raise
    return destination


def verified(machine):
    """Have the checking guest verify all its pages; returns how many, and how many were wrong."""
    control = guest_abi.control_view(raw(machine))
    number = int(control["verify_request"][0]) + 1
    control["verify_request"] = number
    eventually(lambda: (cpus(machine)["verify_done"] == number).all(), timeout=60)
    now = cpus(machine)
    return int(now["verify_pages"].sum()), int(now["verify_mismatches"].sum() + now["mismatches"].sum())


def bits(words, pages):
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:pages].astype(bool)
