"""``/dev/kvm`` itself: is KVM usable here, what can it do, and new VMs."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from ..errors import KvmError, KvmUnavailable
from .abi_numbers import CAP_SINCE, KVM_API_VERSION, Cap, Request
from .cpuid import CpuidEntry, pack_cpuid, unpack_cpuid
from .handle import Handle
from .vm import Vm

REQUIRED = (
    Cap.USER_MEMORY,
    Cap.SYNC_MMU,
    Cap.SET_TSS_ADDR,
    Cap.SET_IDENTITY_MAP_ADDR,
    Cap.EXT_CPUID,
    Cap.MP_STATE,
    Cap.ADJUST_CLOCK,
    Cap.VCPU_EVENTS,
    Cap.DEBUGREGS,
    Cap.XSAVE,
    Cap.XCRS,
    Cap.GET_TSC_KHZ,
    Cap.ENABLE_CAP_VM,
    Cap.IMMEDIATE_EXIT,
)
"""Without these amig can't run or move a guest."""

_MAX_ENTRIES = 4096


class Kvm(Handle):
    """An open ``/dev/kvm``. Use `Kvm.open`; usable from any thread; a context manager that closes it.

    VMs made from it outlive it.
    """

    @classmethod
    def open(cls, path: str = "/dev/kvm", *, required: Iterable[Cap] = REQUIRED) -> Kvm:
        """Open ``path`` and check that this KVM will do. Raises KvmUnavailable, whose text says what to do."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            text = (
                f"no {path}: load the module (`modprobe kvm_intel` or `kvm_amd`), enable virtualization in the "
                "firmware, or, in a virtual machine or container, ask for nested virtualization or for the device"
            )
            raise KvmUnavailable(text, request="open", errno=errno.ENOENT) from None
        except PermissionError as error:
            text = (
                f"no permission to open {path}: add your user to group kvm (`usermod -aG kvm USER`, then log in again)"
            )
            raise KvmUnavailable(text, request="open", errno=error.errno or errno.EACCES) from None
        except OSError as error:
            text = f"can't open {path}: {error.strerror}; is virtualization enabled in the firmware?"
            raise KvmUnavailable(text, request="open", errno=error.errno or 0) from None
        kvm = cls(fd, path)
        try:
            kvm._check(path, required)
        except BaseException:
            kvm.close()
            raise
        return kvm

    def _check(self, path: str, required: Iterable[Cap]) -> None:
        try:
            version = self._call(Request.KVM_GET_API_VERSION)
        except KvmError as error:
            raise KvmUnavailable(
                f"{path} is not a KVM device ({error})", request=error.request, errno=error.errno
            ) from None
        if version != KVM_API_VERSION:
            text = (
                f"{path} speaks KVM API version {version}, amig needs {KVM_API_VERSION}: use a kernel of this century"
            )
            raise KvmUnavailable(text, request=Request.KVM_GET_API_VERSION.name)
        for cap in required:
            self.require(cap)

    def check_extension(self, cap: Cap) -> int:
        """What the kernel answers for ``cap`` (0: not there; the meaning of other numbers depends on it)."""
        return self._call(Request.KVM_CHECK_EXTENSION, cap)

    def require(self, cap: Cap) -> int:
        """As `check_extension`, but KvmUnavailable, naming the capability and its first kernel, if it is missing."""
        answer = self.check_extension(cap)
        if not answer:
            since = f"Linux {CAP_SINCE[cap]}" if cap in CAP_SINCE else "kernels before Linux 3.0"
            text = f"this KVM lacks KVM_CAP_{cap.name}, which amig needs (there since {since}): use a newer kernel"
            raise KvmUnavailable(text, request=Request.KVM_CHECK_EXTENSION.name)
        return answer

    def vcpu_mmap_size(self) -> int:
        """Bytes to map of a vCPU's descriptor for its ``kvm_run``."""
        return self._call(Request.KVM_GET_VCPU_MMAP_SIZE)

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """The CPUID entries that this host's KVM can give a guest (api.rst 4.46)."""
        count = 128
        while count <= _MAX_ENTRIES:
            buffer = ctypes.create_string_buffer(pack_cpuid((), room=count))
            try:
                self._call(Request.KVM_GET_SUPPORTED_CPUID, ctypes.addressof(buffer))
            except KvmError as error:
                if error.errno != errno.E2BIG:
                    raise
                count *= 2
                continue
            return unpack_cpuid(buffer.raw)
        raise KvmError(
            "KVM_GET_SUPPORTED_CPUID: the list does not end", request="KVM_GET_SUPPORTED_CPUID", errno=errno.E2BIG
        )

    def msr_index_list(self) -> tuple[int, ...]:
        """The MSRs that make up a vCPU's state on this host (api.rst 4.3)."""
        return self._index_list(Request.KVM_GET_MSR_INDEX_LIST)

    def msr_feature_index_list(self) -> tuple[int, ...]:
        """The MSRs that describe this host's KVM (api.rst 4.3)."""
        return self._index_list(Request.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def _index_list(self, request: Request) -> tuple[int, ...]:
        count = 512
        while count <= _MAX_ENTRIES:
            buffer = ctypes.create_string_buffer(struct.pack("<I", count) + bytes(4 * count))
            try:
                self._call(request, ctypes.addressof(buffer))
            except KvmError as error:
                if error.errno != errno.E2BIG:
                    raise
                count *= 2
                continue
            (got,) = struct.unpack_from("<I", buffer)
            return struct.unpack_from(f"<{got}I", buffer, 4)
        raise KvmError(f"{request.name}: the list does not end", request=request.name, errno=errno.E2BIG)

    def create_vm(self) -> Vm:
        """A new, empty VM, usable in this process only."""
        fd = self._call(Request.KVM_CREATE_VM)
        try:
            vm = Vm(fd, vcpu_mmap_size=self.vcpu_mmap_size(), msr_indices=self.msr_index_list())
        except BaseException:
            os.close(fd)
            raise
        if vm.check_extension(Cap.EXCEPTION_PAYLOAD):
            vm.enable_cap(Cap.EXCEPTION_PAYLOAD, 1)  # a pending page or debug fault then keeps its CR2 or DR6 in a move
        return vm
