"""Opening /dev/kvm: usable, or a text that says what to do."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from amig.errors import KvmError, KvmUnavailable
from amig.kvm import system
from amig.kvm.abi_numbers import Cap, Request
from amig.kvm.cpuid import pack_cpuid
from amig.kvm.handle import Handle
from amig.kvm.system import REQUIRED, Kvm


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(KvmUnavailable, match=r"no .*kvm: load the module"):
        Kvm.open(str(tmp_path / "kvm"))


def test_no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(system.os, "open", refuse)
    with pytest.raises(KvmUnavailable, match="add your user to group kvm") as caught:
        Kvm.open()
    assert caught.value.errno == errno.EACCES


def test_a_device_that_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(system.os, "open", refuse)
    with pytest.raises(KvmUnavailable, match="No such device"):
        Kvm.open()


def test_something_that_is_no_kvm() -> None:
    before = open_descriptors()
    with pytest.raises(KvmUnavailable, match=r"/dev/null is not a KVM device .*KVM_GET_API_VERSION failed: ENOTTY"):
        Kvm.open("/dev/null")
    assert open_descriptors() == before


def pretend(monkeypatch: pytest.MonkeyPatch, version: int, missing: Cap | None = None) -> None:
    def call(self: Handle, request: Request, arg: int = 0) -> int:
        return version if request is Request.KVM_GET_API_VERSION else int(arg != missing)

    monkeypatch.setattr(Kvm, "_call", call)


def test_another_api_version(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 11)
    with pytest.raises(KvmUnavailable, match="speaks KVM API version 11, amig needs 12"):
        Kvm.open("/dev/null")


@pytest.mark.parametrize("missing", REQUIRED)
def test_a_missing_capability_is_named_with_its_first_kernel(monkeypatch: pytest.MonkeyPatch, missing: Cap) -> None:
    pretend(monkeypatch, 12, missing)
    with pytest.raises(KvmUnavailable, match=f"lacks KVM_CAP_{missing.name}, .*Linux [3-6]\\.[0-9]+"):
        Kvm.open("/dev/null")


def test_a_list_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: Handle, request: Request, arg: int = 0) -> int:
        raise KvmError("too long", request=request.name, errno=errno.E2BIG)

    with Kvm(os.open("/dev/null", os.O_RDWR), "x") as kvm:
        monkeypatch.setattr(Kvm, "_call", call)
        with pytest.raises(KvmError, match="does not end"):
            kvm.supported_cpuid()
        with pytest.raises(KvmError, match="does not end"):
            kvm.msr_index_list()


def test_close_waits_for_a_call_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave, order = threading.Event(), threading.Event(), list[str]()

    def slow(fd: int, request: Request, arg: int) -> int:
        entered.set()
        leave.wait(30)
        order.append("returned")
        os.fstat(fd)  # still open
        return 1

    monkeypatch.setattr("amig.kvm.handle.ioctl", slow)
    kvm = Kvm(os.open("/dev/null", os.O_RDWR), "x")
    caller = threading.Thread(target=lambda: kvm.check_extension(Cap.IRQCHIP))
    caller.start()
    entered.wait(30)

    def close() -> None:
        kvm.close()
        order.append("closed")

    closer = threading.Thread(target=close)
    closer.start()
    while not kvm.closed:
        pass
    with pytest.raises(KvmError, match="closed"):
        kvm.check_extension(Cap.IRQCHIP)
    leave.set()
    caller.join(30)
    closer.join(30)
    assert order == ["returned", "closed"]


@pytest.mark.kvm
def test_what_this_kvm_can_do() -> None:
    before = open_descriptors()
    with Kvm.open() as kvm:
        assert kvm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2) & 1
        assert kvm.require(Cap.IMMEDIATE_EXIT)
        assert kvm.vcpu_mmap_size() >= 2352
        assert 0x10 in kvm.msr_index_list()
        assert len(kvm.msr_feature_index_list()) >= 1
        with kvm.create_vm() as vm:
            assert repr(vm) == "<VM>"
        assert repr(vm) == "<VM (closed)>"
    assert open_descriptors() == before


@pytest.mark.kvm
def test_a_short_buffer_for_cpuid_is_made_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = []

    def cramped(entries: tuple[()], *, room: int) -> bytes:
        rooms.append(room)
        return pack_cpuid(entries, room=room if len(rooms) > 1 else 2)

    with Kvm.open() as kvm:
        monkeypatch.setattr(system, "pack_cpuid", cramped)
        assert len(kvm.supported_cpuid()) > 2
    assert rooms == [128, 256]
