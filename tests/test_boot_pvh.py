"""Loading PVH images: what a guest finds in memory, and what is refused."""

import struct

import pytest

from amig.errors import BootError, UsageError
from amig.host import acpi, boot_pvh, guest_abi
from amig.host.boot import BootConfig, Claims, Mode, read_image
from amig.host.images import image_path
from amig.host.layout import GIB, MIB
from amig.host.memory import MemfdMemory
from tests.images import LOAD, NOTE, amig_note, elf_file, note, pvh_note


@pytest.fixture
def memory():
    m = MemfdMemory.create(64 * MIB)
    yield m
    m.close()


def image(*notes, paddr=MIB, memsz=0x2000, code=b"\xf4", **more):
    joined = b"".join(notes)
    return elf_file((LOAD, paddr, memsz, 4096, code), (NOTE, 0, len(joined), 4, joined), **more)


def load(memory, data, *, vcpus=1, append="", initrd=None, tsc_khz=1000):
    config = BootConfig(kernel=image_path(), append=append, initrd=initrd)
    return boot_pvh.load(memory, config, data, vcpus=vcpus, tsc_khz=tsc_khz)


def start_info(memory, at=boot_pvh.START_INFO):
    names = ["magic", "version", "flags", "modules", "modlist", "cmdline", "rsdp", "memmap", "entries", "reserved"]
    return dict(zip(names, struct.unpack("<IIIIQQQQII", memory.read(at, 56)), strict=True))


def c_string(memory, at):
    return memory.read(at, 16384).split(b"\0")[0]


@pytest.mark.parametrize("bits", [32, 64])
def test_a_pvh_image_is_loaded_and_entered(memory, bits):
    plan = load(memory, image(pvh_note(MIB + 4), code=b"\x90\x90\x90\x90\xf4", bits=bits), append="a=b c")
    (entry,) = plan.entries
    assert plan.kind == "pvh"
    assert (entry.mode, entry.rip, entry.rbx) == (Mode.PROTECTED, MIB + 4, boot_pvh.START_INFO)
    assert memory.read(MIB, 5) == b"\x90\x90\x90\x90\xf4"
    info = start_info(memory)
    assert (info["magic"], info["version"], info["modules"]) == (0x336EC578, 1, 0)
    assert c_string(memory, info["cmdline"]) == b"a=b c"


def test_the_memory_map_covers_ram_above_4_gib():
    memory = MemfdMemory.create(5 * GIB)
    try:
        load(memory, image(pvh_note(MIB)))
        info = start_info(memory)
        ranges = [struct.unpack("<QQII", memory.read(info["memmap"] + 24 * i, 24)) for i in range(info["entries"])]
        assert [r[:2] for r in ranges if r[2] == 1] == [(0, 0x9FC00), (MIB, 3 * GIB - MIB), (4 * GIB, 2 * GIB)]
    finally:
        memory.close()


def test_an_initrd_becomes_the_first_module_near_the_top(memory, tmp_path):
    path = tmp_path / "initrd"
    path.write_bytes(b"module" * 1000)
    load(memory, image(pvh_note(MIB)), initrd=path)
    info = start_info(memory)
    assert info["modules"] == 1
    start, size, _, _ = struct.unpack("<QQQQ", memory.read(info["modlist"], 32))
    assert (start % 4096, size) == (0, 6000)
    assert start + 8192 == 64 * MIB
    assert memory.read(start, size) == b"module" * 1000


def test_our_own_image_starts_every_vcpu_and_is_told_what_the_host_knows(memory):
    plan = load(memory, image(pvh_note(MIB), amig_note(MIB + 8)), vcpus=3, append="workload=random", tsc_khz=2_000_000)
    assert plan.kind == "amig"
    assert [(e.rip, e.rdi) for e in plan.entries] == [(MIB, 0), (MIB + 8, 1), (MIB + 8, 2)]
    assert c_string(memory, start_info(memory)["cmdline"]) == b"workload=random tsc_khz=2000000 vcpus=3"


def test_another_image_leaves_further_vcpus_to_its_start_up_interrupts(memory):
    plan = load(memory, image(pvh_note(MIB)), vcpus=2, append="x")
    assert plan.entries[1] is None
    assert c_string(memory, start_info(memory)["cmdline"]) == b"x"


def test_the_built_image_loads(memory):
    plan = load(memory, image_path().read_bytes(), vcpus=4)
    assert plan.kind == "amig"
    assert all(entry is not None for entry in plan.entries)
    assert start_info(memory)["cmdline"] < guest_abi.STATUS_GPA


def test_acpi_tables_are_whole(memory):
    load(memory, image(pvh_note(MIB)), vcpus=2)
    rsdp = memory.read(start_info(memory)["rsdp"], 36)
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) % 256 == 0
    assert sum(rsdp) % 256 == 0

    def table(at):
        data = memory.read(at, struct.unpack("<I", memory.read(at + 4, 4))[0])
        assert sum(data) % 256 == 0, data[:4]
        return data

    xsdt = table(struct.unpack_from("<Q", rsdp, 24)[0])
    found = {t[:4]: t for t in map(table, struct.unpack("<2Q", xsdt[36:]))}
    fadt, madt = found[b"FACP"], found[b"APIC"]
    assert len(fadt) == 268
    assert struct.unpack_from("<IB", fadt, 64)[0] == acpi.PM1_CONTROL_PORT
    assert fadt[128] == acpi.RESET_VALUE
    assert struct.unpack_from("<BBBBQ", fadt, 116) == (1, 8, 0, 0, acpi.RESET_PORT)
    assert struct.unpack_from("<Q", fadt, 140)[0] == struct.unpack_from("<I", fadt, 40)[0]
    assert struct.unpack_from("<BBBBQ", fadt, 172) == (1, 16, 0, 0, acpi.PM1_CONTROL_PORT)
    dsdt = table(struct.unpack_from("<I", fadt, 40)[0])
    assert dsdt[:4] == b"DSDT"
    assert b"_S5_" in dsdt
    facs = struct.unpack_from("<I", fadt, 36)[0]
    assert facs % 64 == 0
    assert memory.read(facs, 4) == b"FACS"
    apic_ids, at = [], 44
    while at < len(madt):
        if madt[at] == 0:
            apic_ids.append(madt[at + 3])
        at += madt[at + 1]
    assert apic_ids == [0, 1]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (image(note(b"GNU", 18, bytes(4))), "no PVH note"),
        (image(note(b"Xen", 18, bytes(5))), "5 bytes"),
        (image(pvh_note(2 * MIB)), "outside of what is loaded"),
        (image(pvh_note(0x2000), paddr=0x2000), "would overwrite"),
        (image(pvh_note(MIB), paddr=0x9F000), "does not fit"),
        (image(pvh_note(MIB), memsz=64 * MIB), "does not fit"),
        (image(pvh_note(MIB), paddr=1 << 40), "does not fit"),
        (image(pvh_note(MIB), amig_note(MIB, abi=99)), "ABI 99"),
        (image(pvh_note(MIB), amig_note(5 * MIB)), "outside of what is loaded"),
        (image(pvh_note(MIB), amig_note(MIB, max_cpus=1)), "at most 1"),
        (b"\x7fELF", "not an ELF"),
    ],
)
def test_an_image_that_can_not_be_booted_is_refused(memory, data, why):
    with pytest.raises(BootError, match=why):
        load(memory, data, vcpus=2)


def test_a_command_line_that_is_too_long_is_refused(memory):
    with pytest.raises(UsageError, match="command line"):
        load(memory, image(pvh_note(MIB)), append="x" * 20000)
    with pytest.raises(UsageError, match="command line"):
        load(memory, image(pvh_note(MIB)), append="a\0b")


def test_files_that_can_not_be_read_are_named(tmp_path):
    with pytest.raises(BootError, match=r"can't read the initrd .*missing: No such file"):
        read_image(tmp_path / "missing", "initrd")
    with pytest.raises(BootError, match=r"Is a directory"):
        read_image(tmp_path, "kernel")
    (tmp_path / "empty").touch()
    with pytest.raises(BootError, match="0 bytes"):
        read_image(tmp_path / "empty", "kernel")


def test_claims_keep_pieces_apart(memory):
    claims = Claims(memory)
    claims.claim(60 * MIB, 2 * MIB, "one")
    assert claims.claim_high(3 * MIB, 64 * MIB, "two") == 57 * MIB
    assert claims.claim_high(2 * MIB, 64 * MIB, "three") == 62 * MIB
    assert claims.claim_high(4096, 32 * MIB + 5, "four") == 32 * MIB - 4096
    with pytest.raises(BootError, match="would overwrite one"):
        claims.claim(61 * MIB, 1, "five")
    with pytest.raises(BootError, match="does not fit"):
        claims.claim_high(56 * MIB, 64 * MIB, "six")
