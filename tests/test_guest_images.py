"""The guest image: found, rebuilt byte for byte, mirrored in Python, and true to its word under QEMU.

QEMU runs it here because it is a host that knows nothing of amig: no wait port, no further vCPUs, its own loader. Most
tests emulate: that boots in 0.2 s. Its usual firmware takes 3 s and more on a KVM that interprets ring 0, so there the
smallest one that QEMU brings goes before the image.
"""

import contextlib
import mmap
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from amig.errors import BootError, GuestError
from amig.host import elf, guest_abi, images
from amig.host.guest_abi import Bad, Fill, Phase, State, Work

SOURCE = Path(__file__).resolve().parent.parent / "guest"
HEADER = SOURCE / "amig_guest.h"
QEMU = "qemu-system-x86_64"
MIB = 1 << 20
SMALL_FIRMWARE = ("-bios", "qboot.rom") if Path("/usr/share/qemu/qboot.rom").exists() else ()
EXIT_DEVICE = ("-device", f"isa-debug-exit,iobase={guest_abi.PORT_EXIT:#x},iosize=4")

needs_source = pytest.mark.skipif(not HEADER.exists(), reason="no checkout: the image's source is not here")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU}")


# ---- the header and its mirror ----

STRUCTS = {
    "amig_range": guest_abi.RANGE,
    "amig_status": guest_abi.STATUS,
    "amig_control": guest_abi.CONTROL,
    "amig_mismatch": guest_abi.MISMATCH,
    "amig_cpu": guest_abi.CPU,
}
ENUMS = {
    "STATE": State,
    "ERROR": guest_abi.Error,
    "WORK": Work,
    "WRITE": guest_abi.Write,
    "FILL": Fill,
    "TSC": guest_abi.Tsc,
    "BAD": Bad,
    "PHASE": Phase,
}


def header_constants():
    text = HEADER.read_text()
    return {name: int(value, 0) for name, value in re.findall(r"#define AMIG_(\w+) (0x[0-9a-f]+|\d+)\b", text)}


def flat(dtype, prefix=""):
    """Yield (name, offset, bytes) of every field, those of nested structures too."""
    for name in dtype.names:
        field, offset = dtype.fields[name][:2]
        yield f"{prefix}{name}", offset, field.itemsize


@needs_source
def test_every_constant_of_the_header_has_its_twin():
    constants = header_constants()
    enums = {f"{word}_{member.name}": int(member) for word, enum in ENUMS.items() for member in enum}
    plain = {"ABI": guest_abi.ABI, "IMAGE": guest_abi.IMAGE}
    names = set(constants) - set(enums) - {"GUEST_ABI", "GUEST_IMAGE"}
    assert {name: constants[name] for name in names} == {name: getattr(guest_abi, name) for name in names}
    assert {name: constants.get(name) for name in enums} == enums
    assert {name: constants[f"GUEST_{name}"] for name in plain} == plain
    assert guest_abi.SHARED_END == guest_abi.CPU_GPA + guest_abi.MAX_CPUS * guest_abi.CPU_STRIDE


@needs_source
@needs_gcc
def test_structures_lie_as_the_compiler_lays_them(tmp_path):
    lines = []
    for struct, dtype in STRUCTS.items():
        lines.append(f'printf("{struct} %zu\\n", sizeof(struct {struct}));')
        lines += [
            f'printf("{struct}.{name} %zu %zu\\n", offsetof(struct {struct}, {name}), '
            f"sizeof(((struct {struct} *)0)->{name}));"
            for name, _, _ in flat(dtype)
        ]
    program = tmp_path / "layout.c"
    program.write_text(
        '#include <stdio.h>\n#include <stddef.h>\n#include "amig_guest.h"\nint main(void)\n{\n'
        + "\n".join(lines)
        + "\nreturn 0;\n}\n"
    )
    binary = tmp_path / "layout"
    subprocess.run(["gcc", "-I", SOURCE, "-o", binary, program], check=True, timeout=60)
    said = subprocess.run([binary], check=True, capture_output=True, text=True, timeout=10).stdout
    ours = []
    for struct, dtype in STRUCTS.items():
        ours.append(f"{struct} {dtype.itemsize}")
        ours += [f"{struct}.{name} {offset} {size}" for name, offset, size in flat(dtype)]
    assert said.splitlines() == ours
    assert guest_abi.CPU.itemsize == guest_abi.CPU_STRIDE


# ---- finding the image, and what is in it ----


def test_the_image_is_found_and_carries_both_entries():
    image = elf.parse(images.image_path().read_bytes())
    note = guest_abi.parse_note(image.note(guest_abi.NOTE_NAME.rstrip(b"\0"), guest_abi.NOTE_BOOT))
    assert note.status_gpa == guest_abi.STATUS_GPA
    assert note.max_cpus == guest_abi.MAX_CPUS
    assert image.note(b"Xen", 18)
    (segment,) = image.segments
    assert segment.paddr == MIB
    assert segment.paddr < note.ap_entry < segment.paddr + segment.memsz <= 2 * MIB
    assert images.DEFAULT in images.image_names()


def test_a_packaged_image_is_preferred_to_the_checkouts(tmp_path):
    package = tmp_path / "amig"
    for directory in images.directories(package):
        directory.mkdir(parents=True)
        (directory / "amig-guest.elf").touch()
    packaged, checkout = images.directories(package)
    assert images.image_path(package=package) == packaged / "amig-guest.elf"
    (packaged / "amig-guest.elf").unlink()
    assert images.image_path(package=package) == checkout / "amig-guest.elf"


def test_a_missing_image_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(BootError, match=r"amig-guest\.elf is neither in .*amig/images and .*guest/images: reinstall"):
        images.image_path(package=tmp_path / "amig")
    with pytest.raises(BootError, match="not the name of a guest image"):
        images.image_path("../../etc/passwd")
    assert images.image_names(package=tmp_path / "amig") == []


def test_notes_that_are_not_ours_are_refused():
    with pytest.raises(BootError, match="8 bytes"):
        guest_abi.parse_note(bytes(8))
    with pytest.raises(BootError, match="ABI 9"):
        guest_abi.parse_note(b"\x09" + bytes(15))


def test_memory_without_a_status_page_is_told_from_one_with():
    memory = bytearray(guest_abi.SHARED_END)
    assert not guest_abi.present(memory)
    assert not guest_abi.present(memory[:100])
    with pytest.raises(GuestError, match="no status page"):
        guest_abi.parse_status(memory)
    with pytest.raises(GuestError, match="memory ends"):
        guest_abi.parse_status(memory[:100])
    status = np.frombuffer(memory, guest_abi.STATUS, 1, guest_abi.STATUS_GPA)
    status["magic"] = guest_abi.STATUS_MAGIC
    assert guest_abi.present(memory)
    with pytest.raises(GuestError, match="ABI 0"):
        guest_abi.parse_status(memory)
    status["abi"] = guest_abi.ABI
    with pytest.raises(GuestError, match="damaged"):
        guest_abi.parse_status(memory)
    status["vcpus"] = 2
    assert guest_abi.parse_status(memory)["vcpus"] == 2
    with pytest.raises(ValueError, match="vcpus"):
        guest_abi.parse_cpus(memory, 65)


@needs_source
@needs_gcc
def test_the_image_is_what_its_source_builds(tmp_path):
    here = []
    for tool in (["gcc", "--version"], ["gcc", "-Wl,--version"]):
        said = subprocess.run(tool, capture_output=True, text=True, timeout=60, check=False).stdout
        here.append(said.partition("\n")[0])
    recorded = (SOURCE / "images" / "COMPILER").read_text().splitlines()
    subprocess.run(
        ["make", "-s", "-C", SOURCE, f"BUILD={tmp_path}/obj", f"OUT={tmp_path}"],
        check=True,
        timeout=100,
        env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
    )
    built = (tmp_path / "amig-guest.elf").read_bytes()
    if here != recorded:
        pytest.skip(f"the source builds, but can't be compared: made by {recorded}, here are {here}")
    assert built == images.image_path().read_bytes(), "run `make -C guest stamp` and commit the image"


# ---- under QEMU ----


class Machine:
    """The image under QEMU, its memory mapped here, its serial port in a file."""

    def __init__(self, folder, append, *, accel="tcg", memory=64 * MIB, extra=()):
        self.serial_path = folder / "serial"
        backing = folder / "memory"
        with backing.open("wb") as f:
            f.truncate(memory)
        cpu = ("-cpu", "qemu64,-sse3", *SMALL_FIRMWARE) if accel == "kvm" else ()
        self.process = subprocess.Popen(
            [
                *(QEMU, "-accel", accel, *cpu, "-nodefaults", "-display", "none", "-no-reboot"),
                *("-object", f"memory-backend-file,id=m,size={memory},mem-path={backing},share=on"),
                *("-machine", "pc,memory-backend=m", "-m", str(memory >> 20)),
                *("-kernel", images.image_path(), "-append", append, "-serial", f"file:{self.serial_path}"),
                *extra,
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        with backing.open("r+b") as f:
            self.map = mmap.mmap(f.fileno(), memory)
        self.memory = np.frombuffer(self.map, np.uint8)

    def close(self):
        self.process.kill()
        self.process.communicate(timeout=30)

    def wait_for(self, condition, seconds=60):
        """Poll until ``condition()`` holds; returns what it returned."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            ended = self.process.poll() is not None
            if ended or time.monotonic() > end:
                errors = self.process.communicate()[1] if ended else ""
                pytest.fail(f"waited in vain (ended: {ended}); serial:\n{self.serial}\n{errors}")
            time.sleep(0.005)
        return found

    def ended(self):
        """Wait for QEMU's end; its exit status."""
        self.process.communicate(timeout=60)
        return self.process.returncode

    def started(self):
        self.wait_for(lambda: guest_abi.present(self.memory) and self.status["state"] == State.RUNNING)
        return self

    @property
    def serial(self):
        return self.serial_path.read_text(errors="replace") if self.serial_path.exists() else ""

    @property
    def status(self):
        return guest_abi.parse_status(self.memory)

    @property
    def cpu(self):
        return guest_abi.parse_cpus(self.memory, 1)[0]

    @property
    def control(self):
        return guest_abi.control_view(self.memory)

    def page(self, number):
        """A page of the working set, in place."""
        at = guest_abi.ws_gpa(self.status, number)
        return self.memory[at : at + guest_abi.PAGE_SIZE]

    def quiesce(self, number):
        self.control["quiesce"] = number
        self.wait_for(lambda: self.cpu["quiesced"] == number)

    def verify(self, number):
        self.control["verify_request"] = number
        self.wait_for(lambda: self.cpu["verify_done"] == number)
        return int(self.cpu["verify_pages"]), int(self.cpu["verify_mismatches"])


@pytest.fixture
def boot(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(append, **options):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            machine = Machine(folder, append, **options)
            stack.callback(machine.close)
            return machine

        yield start


ACCELS = [pytest.param("kvm", marks=pytest.mark.kvm), "tcg"]
any_accel = pytest.mark.parametrize("accel", ACCELS)

WORKLOADS = [
    "workload=idle",
    "workload=fill fill=mixed ws=8M",
    "workload=sequential ws=8M rate=100MB/s",
    "workload=random ws=8M rate=100MB/s write=page",
    "workload=hotspot ws=8M rate=100MB/s hot=90:10",
    "workload=check ws=8M rate=100MB/s",
]


@needs_qemu
@pytest.mark.parametrize(
    ("append", "accel"),
    [(append, "tcg") for append in WORKLOADS]
    + [pytest.param(append, "kvm", marks=pytest.mark.kvm) for append in WORKLOADS[3::2]],
)
def test_every_workload_runs_and_ends_with_a_verdict(boot, append, accel):
    machine = boot(f"{append} seconds=1 report=1", accel=accel, extra=EXIT_DEVICE)
    assert machine.ended() == 1, machine.serial  # the debug-exit device makes 2n+1 of n: memory intact
    status, cpu = machine.status, machine.cpu
    work = Work(int(status["workload"]))
    assert f"workload={work.name.lower()}" in append
    assert cpu["heartbeat"] > 100
    assert cpu["mismatches"] == 0
    assert (cpu["writes"] > 0) == (work >= Work.SEQUENTIAL)
    assert f"ready workload={work.name.lower()}" in machine.serial
    assert f"amig-guest {guest_abi.IMAGE}: done writes={cpu['writes']} mismatches=0" in machine.serial
    if work == Work.CHECK:
        assert "check: final ok pages=2048 mismatches=0" in machine.serial
        assert cpu["verify_pages"] == 2048


@needs_qemu
@any_accel
def test_the_check_passes_over_all_pages_and_answers_requests(boot, accel):
    machine = boot("workload=check ws=16MiB fill=mixed report=1", accel=accel).started()
    machine.wait_for(lambda: machine.cpu["passes"] >= 3)
    assert machine.verify(7) == (4096, 0)
    machine.wait_for(lambda: "check: verify 7 ok pages=4096 mismatches=0" in machine.serial)
    assert "check: pass 1 ok pages=4096 mismatches=0" in machine.serial
    assert int(machine.cpu["verified"]) >= 2 * int(machine.cpu["writes"])


def torn(machine):
    machine.page(700)[4000] ^= 1


def zeroed(machine):
    machine.page(700)[:] = 0


def foreign(machine):
    machine.page(700)[:] = machine.page(701)


def garbage(machine):
    machine.page(700)[:] = 0xEE


DAMAGE = [(torn, Bad.TORN, 500), (zeroed, Bad.ZERO, 0), (foreign, Bad.FOREIGN, 0), (garbage, Bad.GARBAGE, 0)]


@needs_qemu
def test_damage_from_outside_is_found_and_named(boot):
    machine = boot("workload=check ws=8MiB rate=50MB/s").started()
    machine.wait_for(lambda: machine.cpu["passes"] >= 1)
    machine.quiesce(1)
    intact = machine.page(700).copy()
    for n, (damage, kind, word) in enumerate(DAMAGE):
        damage(machine)
        assert machine.verify(n + 1) == (2048, 1)
        seen = machine.cpu["mismatch"][n]
        assert (seen["page"], seen["kind"], seen["word"], seen["phase"]) == (700, kind, word, Phase.REQUEST)
        assert seen["gpa"] == guest_abi.ws_gpa(machine.status, 700)
        assert seen["expected_gen"] == int(intact[8:16].view("<u8")[0])
        machine.page(700)[:] = intact
    assert machine.verify(99) == (2048, 0)
    assert machine.cpu["mismatches"] == len(DAMAGE)
    assert [line.split(": ")[0] for line in guest_abi.mismatches(machine.cpu[np.newaxis])] == [
        f"page 700 at {guest_abi.ws_gpa(machine.status, 700):#x}"
    ] * len(DAMAGE)


@needs_qemu
@any_accel
def test_a_page_put_back_to_an_older_version_is_found_while_the_workload_runs(boot, accel):
    """What a lost page looks like after a migration."""
    machine = boot("workload=check ws=8MiB rate=50MB/s", accel=accel).started()
    older = machine.page(99).copy()
    generation = int(older[8:16].view("<u8")[0])
    machine.wait_for(lambda: int(machine.page(99)[8:16].view("<u8")[0]) > generation)
    machine.quiesce(1)
    newer = int(machine.page(99)[8:16].view("<u8")[0])
    machine.page(99)[:] = older
    machine.control["quiesce"] = 0
    machine.wait_for(lambda: machine.cpu["mismatches"])
    seen = machine.cpu["mismatch"][0]
    assert (seen["page"], seen["kind"]) == (99, Bad.STALE)
    assert (seen["expected_gen"], seen["found_gen"]) == (newer, generation)
    assert seen["phase"] in {Phase.REWRITE, Phase.RANDOM, Phase.PASS}
    machine.wait_for(
        lambda: f"MISMATCH page=99 gpa={seen['gpa']:#x} expected gen={newer} found stale" in machine.serial
    )


@needs_qemu
def test_a_generation_table_that_is_stale_is_found_too(boot):
    machine = boot("workload=check ws=8MiB rate=50MB/s").started()
    machine.quiesce(1)
    table = machine.memory[int(machine.cpu["gen_gpa"]) :][: 4 * 2048].view("<u4")
    assert table[5] >= 1
    table[5] -= 1
    assert machine.verify(1) == (2048, 1)
    assert machine.cpu["mismatch"][0]["kind"] == Bad.NEWER


@needs_qemu
def test_a_quiesced_guest_writes_nothing_to_its_working_set(boot):
    machine = boot("workload=random ws=8MiB rate=400MB/s").started()
    machine.wait_for(lambda: machine.cpu["writes"] > 1000)
    machine.quiesce(3)
    writes, beats = machine.cpu["writes"], machine.cpu["heartbeat"]
    before = [machine.page(n).copy() for n in range(0, 2048, 64)]
    machine.wait_for(lambda: machine.cpu["heartbeat"] > beats + 1000)
    assert machine.cpu["writes"] == writes
    assert all((machine.page(n) == page).all() for n, page in zip(range(0, 2048, 64), before, strict=True))
    machine.control["quiesce"] = 0
    machine.wait_for(lambda: machine.cpu["writes"] > writes)
    assert machine.cpu["quiesced"] == 0


@needs_qemu
@any_accel
def test_the_guests_own_clock_sees_a_stop(boot, accel):
    machine = boot("workload=idle", accel=accel).started()
    machine.control["gap_reset"] = 5
    machine.wait_for(lambda: machine.cpu["gap_ack"] == 5)
    machine.process.send_signal(signal.SIGSTOP)
    beats = machine.wait_for(lambda: settled(machine))
    time.sleep(0.2)  # the gap itself, not a wait for something
    machine.process.send_signal(signal.SIGCONT)
    machine.wait_for(lambda: machine.cpu["heartbeat"] > beats)
    assert machine.cpu["gap_max"] >= 0.15 * 1000 * int(machine.status["tsc_khz"])  # which the guest measured itself
    assert machine.cpu["gap_tsc"] <= machine.cpu["tsc"]


def settled(machine):
    """The heartbeat once it stands still for 20 ms (a stopped process), else None."""
    first = machine.cpu["heartbeat"]
    time.sleep(0.02)
    return first if machine.cpu["heartbeat"] == first else None


@needs_qemu
@pytest.mark.parametrize("kind", [Fill.ZERO, Fill.CONST, Fill.TEXT, Fill.RANDOM, Fill.MIXED])
def test_memory_is_filled_as_asked(boot, kind):
    machine = boot(f"workload=fill fill={kind.name.lower()} ws=1MiB fill_size=2MiB").started()
    assert machine.cpu["filled"] == 512
    (gpa, pages), *others = guest_abi.ws_ranges(machine.status)
    assert (pages, others) == (256, [])
    beyond = machine.memory[gpa + MIB :]
    rest = int(beyond[: MIB // 2].any())
    words = machine.memory[gpa : gpa + MIB].view("<u8").reshape(256, 512)
    distinct = [len(np.unique(page)) for page in words]
    expected = {
        Fill.ZERO: (1, 1),
        Fill.CONST: (1, 1),
        Fill.TEXT: (20, 32),
        Fill.RANDOM: (512, 512),
    }
    if kind == Fill.MIXED:
        assert distinct == [512, 1] * 128
    else:
        low, high = expected[kind]
        assert all(low <= n <= high for n in distinct)
    assert bool(words.any()) == (kind != Fill.ZERO)
    assert rest == (kind != Fill.ZERO)


@needs_qemu
def test_hot_pages_get_their_share_of_the_writes(boot):
    machine = boot("workload=hotspot ws=16MiB hot=80:25 rate=200MB/s write=page").started()
    machine.wait_for(lambda: machine.cpu["writes"] > 1000)
    machine.quiesce(1)
    gpa = guest_abi.ws_gpa(machine.status, 0)
    words = machine.memory[gpa : gpa + 16 * MIB].view("<u8").reshape(4096, 512)
    written = words.any(axis=1)
    writes = int(machine.cpu["writes"])
    # pages hit at least once when n balls fall into m bins: m (1 - (1 - 1/m)^n)
    hot, cold = (m * (1 - (1 - 1 / m) ** (writes * part)) for m, part in ((1024, 0.8), (3072, 0.2)))
    assert written[:1024].sum() == pytest.approx(hot, rel=0.2)
    assert written[1024:].sum() == pytest.approx(cold, rel=0.2)


@needs_qemu
@any_accel
def test_memory_above_the_hole_is_used(boot, accel):
    machine = boot("workload=check ws=8MiB ws_from=4G rate=50MB/s", accel=accel, memory=5 << 30).started()
    (gpa, pages), *_ = guest_abi.ws_ranges(machine.status)
    assert gpa >= 4 << 30
    assert pages == 2048
    assert machine.status["ram_pages"] > (5 << 30) // 4096 - 2048
    assert machine.verify(1) == (2048, 0)


@needs_qemu
@pytest.mark.parametrize(
    ("append", "error", "message"),
    [
        ("workload=dance", guest_abi.Error.OPTION, b"bad option: workload=dance"),
        ("ws=5Q", guest_abi.Error.OPTION, b"bad option: ws=5Q"),
        ("vcpus=0", guest_abi.Error.OPTION, b"bad option: vcpus=0"),
        ("workload=random ws=1G", guest_abi.Error.MEMORY, b"ws does not fit the memory"),
        ("workload=check ws=0", guest_abi.Error.OPTION, b"ws: at least a page"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(boot, append, error, message):
    machine = boot(append, extra=EXIT_DEVICE)
    assert machine.ended() == 5  # 2 on the exit port
    assert machine.status["state"] == State.ERROR
    assert machine.status["error"] == error
    assert machine.status["message"].startswith(message)
    assert f"amig-guest: ERROR {message.decode()}" in machine.serial


@needs_qemu
@any_accel
def test_an_exception_is_told_before_the_end(boot, accel):
    machine = boot("crash=fault", accel=accel, extra=EXIT_DEVICE)
    assert machine.ended() == 5
    assert machine.status["state"] == State.FAULT
    assert machine.cpu["state"] == State.FAULT
    assert machine.cpu["fault_vector"] == 6
    assert re.search(r"^FAULT vector=6 error=0x0 rip=0x1[0-9a-f]{5} ", machine.serial, re.M)


@needs_qemu
def test_words_that_are_not_ours_are_ignored(boot):
    machine = boot("console=ttyS0 quiet ws=1m workload=sequential foo=bar tsc_khz=1000000").started()
    assert machine.status["workload"] == Work.SEQUENTIAL
    assert machine.status["ws_pages"] == 256
    assert machine.status["tsc_khz"] == 1000000
    assert machine.status["tsc_source"] == guest_abi.Tsc.OPTION
    assert machine.status["wait_port"] == 0
