"""The one place that calls ``ioctl``.

ctypes, not `fcntl.ioctl`: the latter refuses int arguments above 0x7fffffff, keeps the GIL for large mutable buffers,
and from Python 3.14 on retries EINTR, so that a kicked vCPU would never come back. ctypes releases the GIL.
"""

from __future__ import annotations

import ctypes
import errno
import os

from ..errors import KvmError
from .abi_numbers import Request

_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
_ioctl.restype = ctypes.c_int
_errno = ctypes.get_errno

_RETRIES = 1000
"""How often an interrupted request (other than KVM_RUN) is tried again; signals come singly, so this is no limit."""

_REMEDIES: dict[int, str] = {
    errno.EBADF: "the handle was closed, or is not a KVM descriptor",
    errno.ENOTTY: "not a KVM descriptor, or this kernel does not know the request: check the kernel's version",
    errno.EACCES: "add your user to group kvm, or run as root",
    errno.EPERM: "this process may not do that: check the container's or sandbox's rules",
    errno.ENOMEM: "the kernel is out of memory: free some, or make the guest smaller",
    errno.EFAULT: "the buffer is not mapped or is too small",
    errno.EINVAL: "an argument is out of range for this kernel, or the request came in the wrong order",
    errno.E2BIG: "the list is longer than the kernel takes or than the buffer holds",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
    errno.ENFILE: "the system has too many open files",
    errno.EIO: "KVM works only in the process that created the VM; after a fork, create a new one",
    errno.ENODEV: "the device is gone, or this machine's processor has no virtualization enabled",
}

_SPECIAL: dict[tuple[int, int], str] = {
    (Request.KVM_CREATE_VM, errno.EBUSY): "another hypervisor (VirtualBox, VMware) uses the processor: stop it",
    (Request.KVM_CREATE_VCPU, errno.EEXIST): "a vCPU of that index exists: every vCPU needs an index of its own",
    (Request.KVM_CREATE_VCPU, errno.EINVAL): "the index is above this KVM's limit: use fewer vCPUs",
    (Request.KVM_CREATE_IRQCHIP, errno.EEXIST): "create the interrupt controllers once, before the vCPUs",
    (Request.KVM_CREATE_IRQCHIP, errno.EINVAL): "create the interrupt controllers before the vCPUs",
    (Request.KVM_CREATE_PIT2, errno.EEXIST): "the timer exists already",
    (Request.KVM_SET_USER_MEMORY_REGION, errno.EEXIST): "the region overlaps another slot's guest addresses",
    (Request.KVM_SET_USER_MEMORY_REGION, errno.EINVAL): (
        "addresses and size must be multiples of 4 KiB, and a slot's size can't change while it exists"
    ),
    (Request.KVM_GET_DIRTY_LOG, errno.ENOENT): "no such slot, or its dirty log is off",
    (Request.KVM_CLEAR_DIRTY_LOG, errno.ENOENT): "no such slot, or its dirty log is off",
    (Request.KVM_GET_DIRTY_LOG, errno.ENXIO): "this VM logs by dirty ring: harvest the ring instead",
    (Request.KVM_CLEAR_DIRTY_LOG, errno.ENXIO): "this VM logs by dirty ring: reset the ring instead",
    (Request.KVM_GET_LAPIC, errno.EINVAL): "the VM has no in-kernel interrupt controllers",
    (
        Request.KVM_SET_CPUID2,
        errno.EINVAL,
    ): "KVM refuses a changed CPUID once the vCPU ran: set it before the first run",
}


def remedy(request: int, error: int) -> str:
    """What the user can do about ``error`` (an errno) from ``request``; empty if nothing is known."""
    return _SPECIAL.get((request, error)) or _REMEDIES.get(error, "")


def failure(request: Request, error: int) -> KvmError:
    """The KvmError that names the request, the errno and the remedy."""
    name = errno.errorcode.get(error, str(error))
    text = f"{request.name} failed: {name} ({os.strerror(error)})"
    advice = remedy(request, error)
    return KvmError(f"{text}; {advice}" if advice else text, request=request.name, errno=error)


def ioctl(fd: int, request: Request, arg: int = 0) -> int:
    """``ioctl(fd, request, arg)``; ``arg`` is a number or an address that the caller keeps alive.

    Returns what the kernel returned (0 or more). An interrupted request is made again. Raises KvmError.
    """
    for _ in range(_RETRIES):
        result: int = _ioctl(fd, request, arg)
        if result >= 0:
            return result
        error = _errno()
        if error != errno.EINTR:
            break
    raise failure(request, error)


_KVM_RUN = int(Request.KVM_RUN)
_INTERRUPTED = (errno.EINTR, errno.EAGAIN)  # EAGAIN: a vCPU that waited for its start-up signal has just got it


def run(fd: int) -> bool:
    """KVM_RUN: True if the vCPU left the guest for a reason of its own, False if a signal or immediate_exit did it.

    Raises KvmError for anything else. The GIL is released while the guest runs.
    """
    if _ioctl(fd, _KVM_RUN, 0) >= 0:
        return True
    error = _errno()
    if error in _INTERRUPTED:
        return False
    raise failure(Request.KVM_RUN, error)
