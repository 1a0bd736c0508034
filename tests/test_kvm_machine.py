"""Machines on real KVM: they boot, pause, are saved and built again elsewhere, end, and leave nothing behind."""

import gc
import os
import threading

import msgspec
import numpy as np
import pytest

from amig.errors import BootError, GuestError, HostError, Refused, UsageError, VerifyFailed
from amig.host import guest_abi, kvm_state
from amig.host.boot import BootConfig
from amig.host.images import image_path
from amig.host.kvm_machine import KvmMachine, MachineConfig
from amig.host.layout import GIB, memory_map
from amig.kvm import state as vcpu_state
from amig.kvm.cpuid import pack_cpuid, unpack_cpuid
from amig.memory import MemoryMap
from tests.conftest import standard_kvm
from tests.images import bzimage
from tests.machines import (
    CF9_RESET,
    ECHO,
    KEYBOARD_RESET,
    MIB,
    NOT_EMULATED,
    POWER_OFF,
    SPIN,
    TRIPLE_FAULT,
    boot,
    count,
    cpus,
    eventually,
    heartbeats,
    move,
    raw,
    stands_still,
    tiny,
    two_sided,
    verified,
    wait_heartbeats,
    wait_running,
)

pytestmark = pytest.mark.kvm


@pytest.fixture
def make():
    """Make machines that are closed at the end, whatever happens."""
    made = []

    def keep(machine):
        made.append(machine)
        return machine

    yield keep
    for machine in made:
        machine.close()


def left_open():
    gc.collect()  # what other tests left goes now, and not between two counts
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def test_our_image_boots_and_all_vcpus_work(make):
    out = bytearray()
    machine = make(boot("workload=random ws=16M rate=50M", vcpus=2, sink=out.extend))
    machine.resume()
    wait_running(machine)
    status = guest_abi.parse_status(raw(machine))
    assert status["wait_port"] == 1
    assert status["tsc_source"] == guest_abi.Tsc.OPTION, "it was told its frequency by the host"
    eventually(lambda: (cpus(machine)["writes"] > 0).all())
    eventually(lambda: b"ready" in out)


def test_without_the_wait_port_the_image_spins(make):
    machine = make(boot(wait_port=False))
    machine.resume()
    wait_running(machine)
    assert guest_abi.parse_status(raw(machine))["wait_port"] == 0
    assert cpus(machine)["waits"].sum() == 0


@pytest.mark.parametrize(("size", "start"), [(3 * GIB + 64 * MIB, 4 * GIB), (18 * GIB, 17 * GIB)])
def test_memory_above_the_hole_is_used(make, size, start):
    machine = make(boot(f"workload=sequential ws=4M ws_from={start >> 30}G", memory=size))
    machine.resume()
    wait_running(machine)
    status = guest_abi.parse_status(raw(machine))
    assert all(gpa >= start for gpa, _ in guest_abi.ws_ranges(status))
    eventually(lambda: machine.memory.data_ranges(0, (start - GIB) // 4096, 4 * MIB // 4096))


def test_a_paused_guest_stands_still_and_resumes(make):
    machine = make(boot("workload=random ws=8M rate=50M", vcpus=2))
    machine.resume()
    machine.resume()
    wait_running(machine)
    for _ in range(20):
        machine.pause()
        machine.pause()
        before = raw(machine)[:MIB].copy()
        beats = heartbeats(machine)
        machine.save()
        assert (heartbeats(machine) == beats).all()
        assert (raw(machine)[:MIB] == before).all()
        machine.resume()
        wait_heartbeats(machine)


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_a_guest_goes_on_in_a_machine_built_from_its_description(make, vcpus):
    source = make(boot("workload=check ws=8M rate=20M fill=mixed", vcpus=vcpus))
    source.resume()
    wait_running(source)
    machine = source
    for _ in range(3):
        machine = make(move(machine))
        beats = heartbeats(machine)
        assert (beats == heartbeats(machine)).all(), "built machines are paused"
        machine.resume()
        wait_heartbeats(machine)
        assert (heartbeats(machine) > beats).all()
        pages, wrong = verified(machine)
        assert (pages, wrong) == (8 * MIB // 4096, 0)


def test_the_check_bites_when_a_page_is_not_copied(make):
    source = make(boot("workload=check ws=4M rate=1M"))
    source.resume()
    wait_running(source)
    destination = make(move(source))
    page = guest_abi.ws_gpa(guest_abi.parse_status(raw(destination)), 77) // 4096
    destination.memory.pages(0)[page] = 0
    destination.resume()
    _, wrong = verified(destination)
    assert wrong > 0


def test_the_console_works_both_ways_and_unread_input_moves(make, tmp_path):
    out, there = bytearray(), bytearray()
    source = make(boot(kernel=tiny(tmp_path, ECHO), sink=out.extend))
    source.resume()
    source.serial_input(b"Hello")
    eventually(lambda: out == b"hELLO")
    source.pause()
    source.serial_input(b"Moved " * 10)
    destination = make(move(source, sink=there.extend))
    destination.resume()
    eventually(lambda: there == b"mOVED\x00" * 10)
    assert out == b"hELLO"


def test_clocks_go_on_where_they_were_saved(make):
    source = make(boot())
    source.resume()
    wait_running(source)
    destination = make(move(source))
    saved = int(cpus(source)["tsc"][0])
    destination.resume()
    wait_heartbeats(destination)
    khz = int(guest_abi.parse_status(raw(destination))["tsc_khz"])
    assert 0 < int(cpus(destination)["tsc"][0]) - saved < 60_000 * khz


# --- ends


@pytest.mark.parametrize("code", [KEYBOARD_RESET, CF9_RESET, POWER_OFF], ids=["keyboard", "cf9", "acpi"])
def test_a_guest_that_switches_itself_off_has_ended_well(make, tmp_path, code):
    machine = make(boot(kernel=tiny(tmp_path, code)))
    ends = []
    machine.on_stopped = ends.append
    machine.resume()
    eventually(lambda: ends)
    assert ends == [None]
    machine.pause()
    machine.resume()
    assert machine.ended
    with pytest.raises(HostError, match="has ended"):
        machine.pause() or machine.save()


def test_a_triple_fault_is_told_with_registers(make, tmp_path):
    machine = make(boot(kernel=tiny(tmp_path, TRIPLE_FAULT)))
    ends = []
    machine.on_stopped = ends.append
    machine.resume()
    eventually(lambda: ends)
    (error,) = ends
    assert isinstance(error, GuestError)
    assert "triple fault" in str(error)
    assert "rip 0000000000100007" in str(error) or "reset the registers" in str(error)  # some processors do that


def test_an_instruction_that_kvm_can_not_emulate_is_told_with_its_bytes(make, tmp_path):
    machine = make(boot(kernel=tiny(tmp_path, NOT_EMULATED)))
    ends = []
    machine.on_stopped = ends.append
    machine.resume()
    eventually(lambda: ends)
    (error,) = ends
    assert isinstance(error, GuestError)
    assert "emulation of an instruction failed [d9 05 00 00 00 d0" in str(error)
    assert "rip 0000000000100000" in str(error)
    machine.pause()
    machine.close()


def test_a_kvm_that_can_not_run_kernels_is_known_before_linux_starts(tmp_path):
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(init_size=MIB, payload=SPIN))
    if standard_kvm():
        boot(kernel=path).close()
        return
    before = left_open()
    with pytest.raises(BootError, match=r"'lock cmpxchg16b \[rsi\]' \(f0 48 0f c7 0e\).*ordinary Intel or AMD"):
        boot(kernel=path)
    assert left_open() == before


def test_when_one_vcpu_ends_the_others_rest_and_it_is_told_once(make, tmp_path):
    machine = make(boot(kernel=two_sided(tmp_path, wait=True), vcpus=2))
    ends = []
    machine.on_stopped = ends.append
    machine.resume()
    eventually(lambda: ends)
    assert count(machine) != bytes(8), "the other vCPU did run"
    eventually(lambda: stands_still(machine), timeout=5, what="the other vCPU runs on")
    assert ends == [None]


def test_a_guest_that_has_ended_is_not_resumed(make, tmp_path):
    machine = make(boot(kernel=two_sided(tmp_path, wait=True), vcpus=2))
    ends = []
    machine.on_stopped = ends.append
    machine.resume()
    eventually(lambda: ends)
    machine.pause()
    before = count(machine)
    for _ in range(20):
        machine.resume()
        machine.pause()
    assert count(machine) == before
    assert ends == [None]


def test_a_guest_that_ends_in_the_middle_of_a_resume_does_not_run_on(make, tmp_path, monkeypatch):
    machine = make(boot(kernel=two_sided(tmp_path, wait=False), vcpus=2))
    ends = []
    machine.on_stopped = ends.append
    first = machine._threads[0]
    resume = first.resume

    def resume_and_end():
        resume()
        eventually(lambda: ends)

    monkeypatch.setattr(first, "resume", resume_and_end)
    machine.resume()
    eventually(lambda: stands_still(machine), timeout=5, what="the other vCPU runs on")


def test_pausing_a_guest_that_ends_at_that_moment_is_safe(make, tmp_path):
    path = tiny(tmp_path, KEYBOARD_RESET)
    for _ in range(20):
        machine = make(boot(kernel=path, memory=4 * MIB))
        ends = []
        machine.on_stopped = ends.append
        machine.resume()
        machine.pause()
        machine.resume()
        eventually(lambda ends=ends: ends)
        machine.pause()
        assert ends == [None]


def test_the_images_verdict_reaches_the_host(make):
    machine = make(boot("workload=check ws=1M rate=10M seconds=1"))
    verdicts = []
    machine.on_workload_end = verdicts.append
    machine.resume()
    eventually(lambda: verdicts)
    assert verdicts == [0]
    assert not machine.ended


# --- order and refusals


def test_state_is_saved_only_while_paused_and_loaded_only_before_running(make):
    machine = make(boot())
    machine.resume()
    with pytest.raises(HostError, match="only while it is paused"):
        machine.save()
    machine.pause()
    state = machine.save()
    with pytest.raises(HostError, match="only before the machine first runs"):
        machine.load(state)


def test_a_machine_whose_state_did_not_load_never_runs(make):
    source = make(boot())
    state = msgspec.msgpack.decode(source.save())
    vcpu = bytearray(state["vcpus"][0])
    vcpu[100] ^= 1
    other = make(KvmMachine.build_like(source.describe(), source.memory.map))
    with pytest.raises(VerifyFailed, match="checksum"):
        other.load(msgspec.msgpack.encode({**state, "vcpus": [bytes(vcpu)]}))
    for broken, why in [
        (b"", "broken"),
        (b"\xc1" * 100, "broken"),
        (msgspec.msgpack.encode({**state, "vcpus": state["vcpus"] * 2}), "numbered"),
        (msgspec.msgpack.encode({**state, "vm": state["vcpus"][0]}), "something else"),
        (msgspec.msgpack.encode({**state, "version": 99}), "version 99"),
        (msgspec.msgpack.encode({**state, "extra": 1}), "broken"),
        (bytes(kvm_state.MAX_STATE_BYTES + 1), "more than"),
    ]:
        with pytest.raises(VerifyFailed, match=why):
            other.load(broken)
    two = make(boot(vcpus=2))
    with pytest.raises(VerifyFailed, match="1 vCPUs, this machine 2"):
        two.load(source.save())


def test_a_state_with_a_feature_that_was_not_announced_is_refused(make):
    """What this host agreed to is the description; the state, which comes when all is sent, may ask for no more."""
    source = make(boot())
    state = msgspec.msgpack.decode(source.save())
    vcpu = vcpu_state.decode(state["vcpus"][0])
    more = [e._replace(ecx=e.ecx | 1 << 16) if e.leaf == 1 else e for e in vcpu.cpuid_entries()]
    vcpus = [vcpu_state.encode(msgspec.structs.replace(vcpu, cpuid=pack_cpuid(more)))]
    other = make(KvmMachine.build_like(source.describe(), source.memory.map))
    with pytest.raises(VerifyFailed, match="features that were not announced: cpuid-1"):
        other.load(msgspec.msgpack.encode({**state, "vcpus": vcpus}))
    other.load(source.save())


def test_a_load_that_fails_half_way_leaves_a_machine_that_refuses_to_run(make, monkeypatch):
    source = make(boot())
    other = make(KvmMachine.build_like(source.describe(), source.memory.map))

    def fail(*_):
        raise VerifyFailed("half way")

    monkeypatch.setattr("amig.kvm.snapshot.restore_vm", fail)
    with pytest.raises(VerifyFailed, match="half way"):
        other.load(source.save())
    with pytest.raises(HostError, match="must not run"):
        other.resume()


def altered(description, **changes):
    fields = msgspec.msgpack.decode(description)
    return msgspec.msgpack.encode({**fields, **changes})


def with_another_feature(description):
    """As from a host whose processor has a feature more."""
    fields = msgspec.msgpack.decode(description)
    seen = [e._replace(ecx=e.ecx | 1 << 16) if e.leaf == 1 else e for e in unpack_cpuid(fields["seen"])]
    return altered(description, seen=pack_cpuid(seen))


def test_a_machine_that_can_not_be_built_here_is_refused_by_name(make):
    source = make(boot())
    good = source.describe()
    before = left_open()
    for description, why in [
        (b"", "can't be read"),
        (b"\xc1\xc1", "can't be read"),
        (bytes(kvm_state.MAX_DESCRIPTION_BYTES + 1), "more than"),
        (altered(good, type="other"), "can't be read"),
        (altered(good, version=99), "version 99"),
        (altered(good, vcpus=0), "can't be read"),
        (altered(good, vcpus=65), "can't be read"),
        (altered(good, devices=["irqchip/1", "gpu/7"]), "gpu/7"),
        (altered(good, devices=[]), "serial16550/1"),
        (altered(good, cpuid=b"\xff" * 100), "malformed"),
        (altered(good, seen=b""), "malformed"),
        (with_another_feature(good), r"lacks what the guest may use: .*leaf|cpuid-1"),
        (altered(good, surprise=1), "can't be read"),
    ]:
        with pytest.raises(Refused, match=why):
            KvmMachine.build_like(description, source.memory.map)
    with pytest.raises(Refused, match="memory"):
        KvmMachine.build_like(good, MemoryMap(generation=0, regions=(), slots=()))
    assert left_open() == before


def test_a_tsc_of_another_frequency_is_refused_where_it_can_not_be_scaled(make, monkeypatch):
    source = make(boot())
    khz = msgspec.msgpack.decode(source.describe())["tsc_khz"]
    monkeypatch.setattr("amig.kvm.snapshot.tsc_fits", lambda saved, here, *, scaling: saved == here)
    KvmMachine.build_like(source.describe(), source.memory.map).close()
    with pytest.raises(Refused, match=f"TSC runs at {khz + 1000} kHz"):
        KvmMachine.build_like(altered(source.describe(), tsc_khz=khz + 1000), source.memory.map)


def test_what_can_not_be_booted_leaves_nothing_behind(tmp_path):
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"#!/bin/sh\n" * 100)
    before = left_open()
    with pytest.raises(BootError, match="neither an ELF image with a PVH note nor a Linux bzImage"):
        boot(kernel=kernel)
    with pytest.raises(BootError, match="No such file"):
        boot(kernel=tmp_path / "missing")
    with pytest.raises(UsageError, match="1000 vCPUs"):
        boot(vcpus=1000)
    with pytest.raises(UsageError, match="unknown processor"):
        boot(cpu="486")
    with pytest.raises(UsageError, match="unknown CPU feature"):
        boot(cpu="host,-telepathy")
    with pytest.raises(UsageError, match="multiple of 4096"):
        boot(memory=64 * MIB + 1)
    assert left_open() == before


def test_features_can_be_hidden(make):
    machine = make(boot(cpu="host,-sse2"))
    (leaf1,) = [e for e in machine._model.entries if e.leaf == 1]
    assert not leaf1.edx >> 26 & 1
    assert "sse2" in machine._model.name


def test_close_gives_everything_back(tmp_path):
    before = left_open()
    machine = boot("workload=random ws=8M", vcpus=2)
    machine.resume()
    wait_running(machine)
    machine.close()
    machine.close()
    machine.serial_input(b"late")
    assert left_open() == before
    for call in (machine.resume, machine.pause, machine.save):
        with pytest.raises(HostError, match="closed"):
            call()
    never_ran = boot(kernel=tiny(tmp_path, SPIN))
    never_ran.close()
    assert left_open() == before


def test_a_description_does_not_depend_on_the_processor_it_was_made_on(make):
    """KVM lists the number of the host's processor that was asked among the guest's CPUID."""
    allowed = os.sched_getaffinity(0)
    descriptions = []
    try:
        for processor in sorted(allowed)[:4]:
            os.sched_setaffinity(0, {processor})
            descriptions.append(msgspec.msgpack.decode(make(boot(vcpus=2)).describe()))
    finally:
        os.sched_setaffinity(0, allowed)
    for other in descriptions:
        other["tsc_khz"] = descriptions[0]["tsc_khz"]  # measured by the kernel
        assert other == descriptions[0]


def test_huge_pages(make):
    with open("/proc/meminfo") as f:
        free = next(int(line.split()[1]) for line in f if line.startswith("HugePages_Free"))
    if free < 32:
        with pytest.raises(HostError, match="guest memory"):
            boot(hugepages=True)
        pytest.skip(f"only {free} huge pages free: seen that it says so")
    machine = make(boot("workload=random ws=8M", hugepages=True))
    machine.resume()
    wait_running(machine)


def test_memory_of_several_regions_is_mapped_as_the_map_says(make):
    source = make(boot())
    machine = make(KvmMachine.build_like(source.describe(), memory_map(3 * GIB + 8 * MIB)))
    assert [s.guest_phys for s in machine.memory.map.slots] == [0, 4 * GIB]
    assert isinstance(machine.memory.pages(0), np.ndarray)


def test_boot_takes_files_not_only_our_own(make, tmp_path):
    machine = make(
        KvmMachine.boot(
            MachineConfig(memory=16 * MIB), BootConfig(kernel=image_path(), initrd=tiny(tmp_path, SPIN), append="x=y")
        )
    )
    machine.resume()
    wait_running(machine)
    assert bytes(guest_abi.parse_status(raw(machine))["cmdline"]).startswith(b"x=y tsc_khz=")
