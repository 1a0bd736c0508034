"""The ABI as written down here is the kernel's."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from amig.kvm import abi_run, abi_vcpu, abi_vm
from amig.kvm.abi_base import KvmStruct, kernel, u32
from amig.kvm.abi_numbers import Cap, ExitReason, Request

STRUCTS = {
    re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower(): cls
    for module in (abi_vm, abi_vcpu, abi_run)
    for name, cls in vars(module).items()
    if name.startswith("Kvm") and isinstance(cls, type) and name not in ("KvmStruct", "KvmUnion")
}


def test_a_structure_of_another_size_than_the_kernels_cannot_be_defined() -> None:
    with pytest.raises(AssertionError, match="has 4 bytes, the kernel's has 8"):

        @kernel(8)
        class TooSmall(KvmStruct):
            field: u32


@pytest.mark.parametrize(
    ("request_", "number"),
    [
        (Request.KVM_GET_DIRTY_LOG, 0x4010AE42),
        (Request.KVM_CLEAR_DIRTY_LOG, 0xC018AEC0),
        (Request.KVM_RESET_DIRTY_RINGS, 0xAEC7),
        (Request.KVM_RUN, 0xAE80),
        (Request.KVM_GET_REGS, 0x8090AE81),
    ],
)
def test_request_numbers_are_those_of_the_kernel(request_: Request, number: int) -> None:
    assert request_ == number


def test_a_blob_of_the_wrong_size_is_refused() -> None:
    regs = abi_vcpu.KvmRegs(rip=7)
    assert abi_vcpu.KvmRegs.from_blob(bytes(regs)).rip == 7
    with pytest.raises(ValueError, match="144 bytes, got 143"):
        abi_vcpu.KvmRegs.from_blob(bytes(143))


def test_everything_agrees_with_the_installed_kernel_headers(tmp_path: Path) -> None:
    if shutil.which("gcc") is None or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("needs gcc and the kernel's headers (apt install gcc linux-libc-dev)")
    lines = ["#include <stdio.h>", "#include <linux/kvm.h>", "int main(void) {"]
    expected: dict[str, int] = {}

    def ask(name: str, expression: str, value: int) -> None:
        expected[name] = value
        lines.append(f'printf("{name} %lu\\n", (unsigned long)({expression}));')

    for name, cls in STRUCTS.items():
        ask(name, f"sizeof(struct {name})", ctypes.sizeof(cls))
    flat = ("exception_", "interrupt_", "nmi_", "smi_", "triple_fault_")
    for name in ("kvm_regs", "kvm_sregs2", "kvm_clock_data", "kvm_clear_dirty_log", "kvm_pit_channel_state", "kvm_run"):
        for field, *_ in STRUCTS[name]._fields_:
            c_field = {"exit": "hw", "sync_regs": "s"}.get(field, field)
            ask(
                f"{name}.{field}", f"__builtin_offsetof(struct {name}, {c_field})", getattr(STRUCTS[name], field).offset
            )
    for field, *_ in abi_vcpu.KvmVcpuEvents._fields_:
        prefix = next((p for p in flat if field.startswith(p)), None)
        c_field = f"{prefix[:-1]}.{field[len(prefix) :]}" if prefix else field
        if field in ("exception_has_payload", "exception_payload"):
            c_field = field
        offset = getattr(abi_vcpu.KvmVcpuEvents, field).offset
        ask(f"events.{field}", f"__builtin_offsetof(struct kvm_vcpu_events, {c_field})", offset)
    for request in Request:
        ask(request.name, request.name, request)
    for prefix, numbers in (("KVM_CAP_", Cap), ("KVM_EXIT_", ExitReason)):
        for number in numbers:
            if number is not ExitReason.MEMORY_FAULT:  # newer than Debian 12's headers
                ask(prefix + number.name, prefix + number.name, number)
    source = tmp_path / "sizes.c"
    source.write_text("\n".join([*lines, "}"]))
    subprocess.run(["gcc", "-o", tmp_path / "sizes", source], check=True)
    output = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout
    assert {name: int(value) for name, value in map(str.split, output.splitlines())} == expected
