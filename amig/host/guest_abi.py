"""What the guest image and its host share: a mirror of ``guest/amig_guest.h`` (a test compares the two).

The guest writes a status page and a block for each vCPU at fixed guest-physical addresses; the host writes a control
page. No word has two writers. A host, a test or an observer of downtime reads them through mapped guest memory::

    status = parse_status(memory)                 # memory[0] is guest-physical address 0
    cpus = parse_cpus(memory, status["vcpus"])    # structured array, shape (vcpus,)
    cpus["heartbeat"].sum(), cpus["mismatches"].sum()

The functions copy, so what they return does not change under the reader. 64-bit words are read whole; two words may
be of different moments.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amig.errors import BootError, GuestError

ABI = 1
IMAGE = 1

STATUS_MAGIC = 0x5453455547494D41
STATUS_GPA = 0x10000
CONTROL_GPA = 0x11000
CPU_GPA = 0x12000
CPU_STRIDE = 1024
MAX_CPUS = 64
SHARED_END = 0x22000
PAGE_SIZE = 4096
MAX_RANGES = 8
MAX_MISMATCHES = 8

PORT_WAIT = 0xA310
PORT_PROBE = 0xA314
PORT_EXIT = 0xA318
PORT_SERIAL = 0x3F8
PROBE_MAGIC = 0x47494D41

NOTE_NAME = b"amig\0"
NOTE_BOOT = 1
_NOTE = struct.Struct("<4I")


class State(enum.IntEnum):
    """``status.state`` and ``cpu.state``."""

    BOOT = 0
    FILLING = 1
    RUNNING = 2
    DONE = 3
    ERROR = 4
    FAULT = 5
    FILLED = 6


class Error(enum.IntEnum):
    """``status.error``."""

    NONE = 0
    MEMORY = 1
    OPTION = 2


class Work(enum.IntEnum):
    """``status.workload``; the lower-case names are the values of the command-line word ``workload=``."""

    IDLE = 0
    FILL = 1
    SEQUENTIAL = 2
    RANDOM = 3
    HOTSPOT = 4
    CHECK = 5


class Write(enum.IntEnum):
    """``status.write_mode``, ``write=``."""

    BYTE = 0
    PAGE = 1


class Fill(enum.IntEnum):
    """``status.fill``, ``fill=``."""

    NONE = 0
    ZERO = 1
    CONST = 2
    TEXT = 3
    RANDOM = 4
    MIXED = 5


class Tsc(enum.IntEnum):
    """``status.tsc_source``: where the guest knows its TSC frequency from."""

    OPTION = 1
    CPUID = 2
    PIT = 3
    GUESS = 4


class Bad(enum.IntEnum):
    """``mismatch.kind``: in what way a page is not what it should be."""

    STALE = 1
    TORN = 2
    ZERO = 3
    FOREIGN = 4
    GARBAGE = 5
    NEWER = 6


_KINDS = {int(kind): kind.name.lower() for kind in Bad}


class Phase(enum.IntEnum):
    """``mismatch.phase``: what found it."""

    REWRITE = 1
    RANDOM = 2
    PASS = 3
    REQUEST = 4


RANGE = np.dtype([("gpa", "<u8"), ("pages", "<u8")])

STATUS = np.dtype(
    [
        ("magic", "<u8"),
        ("abi", "<u4"),
        ("image", "<u4"),
        ("state", "<u4"),
        ("error", "<u4"),
        ("workload", "<u4"),
        ("write_mode", "<u4"),
        ("fill", "<u4"),
        ("wait_port", "<u4"),
        ("vcpus", "<u4"),
        ("cpus_ready", "<u4"),
        ("tsc_khz", "<u4"),
        ("tsc_source", "<u4"),
        ("tick_us", "<u4"),
        ("slice_us", "<u4"),
        ("hot_writes", "<u4"),
        ("hot_pages", "<u4"),
        ("seed", "<u8"),
        ("rate_pages", "<u8"),
        ("ram_pages", "<u8"),
        ("ws_pages", "<u8"),
        ("fill_pages", "<u8"),
        ("gen_gpa", "<u8"),
        ("gen_pages", "<u8"),
        ("boot_tsc", "<u8"),
        ("ready_tsc", "<u8"),
        ("ws_ranges", "<u4"),
        ("reserved", "<u4"),
        ("ws", RANGE, (MAX_RANGES,)),
        ("message", "S128"),
        ("cmdline", "S1024"),
    ]
)
"""``struct amig_status``, one element at :data:`STATUS_GPA`."""

CONTROL = np.dtype([("gap_reset", "<u8"), ("verify_request", "<u8"), ("quiesce", "<u8")])
"""``struct amig_control``, one element at :data:`CONTROL_GPA`, written by the host only (and logged as dirty)."""

MISMATCH = np.dtype(
    [
        ("page", "<u8"),
        ("gpa", "<u8"),
        ("expected_gen", "<u8"),
        ("found_page", "<u8"),
        ("found_gen", "<u8"),
        ("kind", "<u4"),
        ("word", "<u4"),
        ("phase", "<u4"),
        ("cpu", "<u4"),
        ("tsc", "<u8"),
    ]
)

CPU = np.dtype(
    [
        ("heartbeat", "<u8"),
        ("tsc", "<u8"),
        ("writes", "<u8"),
        ("verified", "<u8"),
        ("passes", "<u8"),
        ("mismatches", "<u8"),
        ("gap_ack", "<u8"),
        ("gap_max", "<u8"),
        ("gap_tsc", "<u8"),
        ("verify_done", "<u8"),
        ("verify_pages", "<u8"),
        ("verify_mismatches", "<u8"),
        ("state", "<u4"),
        ("quiesced", "<u4"),
        ("first_page", "<u8"),
        ("pages", "<u8"),
        ("filled", "<u8"),
        ("waits", "<u8"),
        ("skipped", "<u8"),
        ("gen_gpa", "<u8"),
        ("fault_vector", "<u8"),
        ("fault_error", "<u8"),
        ("fault_rip", "<u8"),
        ("fault_cr2", "<u8"),
        ("fault_rsp", "<u8"),
        ("reserved", "<u8", (16,)),
        ("mismatch", MISMATCH, (MAX_MISMATCHES,)),
        ("padding", "u1", (192,)),
    ]
)
"""``struct amig_cpu``, :data:`CPU_STRIDE` bytes: an array of these lies at :data:`CPU_GPA`."""

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.uint8]


def _copy(memory: Buffer, dtype: np.dtype[np.void], count: int, offset: int) -> npt.NDArray[np.void]:
    if np.frombuffer(memory, np.uint8).size < offset + dtype.itemsize * count:
        raise GuestError(f"guest memory ends before {offset + dtype.itemsize * count:#x}: not a guest of amig's image")
    return np.frombuffer(memory, dtype, count, offset).copy()


def present(memory: Buffer) -> bool:
    """Whether the status page at :data:`STATUS_GPA` is filled in (false before boot, or with another guest)."""
    raw = np.frombuffer(memory, np.uint8)
    return (
        raw.size >= SHARED_END and int.from_bytes(raw[STATUS_GPA : STATUS_GPA + 8].tobytes(), "little") == STATUS_MAGIC
    )


def parse_status(memory: Buffer) -> np.void:
    """A copy of the status page as a :data:`STATUS` scalar; ``memory[0]`` is guest-physical address 0.

    Raises GuestError when there is none or its ABI is not ours.
    """
    status: np.void = _copy(memory, STATUS, 1, STATUS_GPA)[0]
    if int(status["magic"]) != STATUS_MAGIC:
        raise GuestError("no status page: the guest is not amig's image, or has not booted yet")
    if int(status["abi"]) != ABI:
        raise GuestError(f"the guest's status page has ABI {int(status['abi'])}, this amig reads {ABI}")
    if not 1 <= int(status["vcpus"]) <= MAX_CPUS or int(status["ws_ranges"]) > MAX_RANGES:
        raise GuestError("the guest's status page is damaged")
    return status


def parse_cpus(memory: Buffer, vcpus: int) -> npt.NDArray[np.void]:
    """A copy of the first ``vcpus`` blocks: array of :data:`CPU`, shape (vcpus,)."""
    if not 1 <= vcpus <= MAX_CPUS:
        raise ValueError(f"vcpus must be 1..{MAX_CPUS}")
    return _copy(memory, CPU, vcpus, CPU_GPA)


def control_view(memory: bytearray | memoryview | npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """The control page in place, shape (1,), to be written by its only writer, the host.

    A write through a mapping is not logged by KVM: while a dirty log is on, mark page ``CONTROL_GPA // PAGE_SIZE``.
    """
    return np.frombuffer(memory, CONTROL, 1, CONTROL_GPA)


def ws_ranges(status: np.void) -> list[tuple[int, int]]:
    """The working set as (guest-physical address, pages), in page-number order."""
    return [(int(r["gpa"]), int(r["pages"])) for r in status["ws"][: int(status["ws_ranges"])]]


def ws_gpa(status: np.void, page: int) -> int:
    """Guest-physical address of a page of the working set. Raises IndexError past its end."""
    for gpa, pages in ws_ranges(status):
        if 0 <= page < pages:
            return gpa + page * PAGE_SIZE
        page -= pages
    raise IndexError("page past the working set")


def mismatches(cpus: npt.NDArray[np.void]) -> Iterator[str]:
    """One line for each recorded mismatch (the first :data:`MAX_MISMATCHES` of each vCPU)."""
    for cpu in cpus:
        for m in cpu["mismatch"][: min(int(cpu["mismatches"]), MAX_MISMATCHES)]:
            kind = _KINDS.get(int(m["kind"]), "unknown")
            yield (
                f"page {int(m['page'])} at {int(m['gpa']):#x}: expected generation {int(m['expected_gen'])}, found "
                f"{kind} (page {int(m['found_page'])}, generation {int(m['found_gen'])}, from word {int(m['word'])})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BootNote:
    """The ELF note ``amig``: how further vCPUs of the image are started."""

    abi: int
    ap_entry: int
    status_gpa: int
    max_cpus: int


def parse_note(descriptor: bytes) -> BootNote:
    """The descriptor of the ELF note (name :data:`NOTE_NAME`, type :data:`NOTE_BOOT`).

    Raises BootError when it is not one that this amig understands.
    """
    if len(descriptor) < _NOTE.size:
        raise BootError(f"the image's amig note has {len(descriptor)} bytes, not {_NOTE.size}")
    abi, ap_entry, status_gpa, max_cpus = _NOTE.unpack_from(descriptor)
    if abi != ABI:
        raise BootError(f"the image's amig note has ABI {abi}, this amig starts images of ABI {ABI}")
    return BootNote(abi=abi, ap_entry=ap_entry, status_gpa=status_gpa, max_cpus=max_cpus)
