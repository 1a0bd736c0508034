"""The two ioctls that the whole project turns on: read the dirty bitmap, and clear chosen bits of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .abi_numbers import Request
from .abi_vm import KvmClearDirtyLog, KvmDirtyLog
from .handle import Handle

if TYPE_CHECKING:
    from .vm import Region

Bitmap = npt.NDArray[np.uint64]
"""One bit a page, page 0 in bit 0 of word 0; a multiple of 64 pages."""


def words(pages: int) -> int:
    """How many 64-bit words a bitmap of ``pages`` has."""
    return (pages + 63) // 64


class DirtyLogCalls(Handle):
    """KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG of a VM, with the checks that keep the kernel inside our buffers."""

    def region(self, slot: int) -> Region:
        """The slot as registered; raises UsageError if there is none."""
        raise NotImplementedError

    def get_dirty_log(self, slot: int, out: Bitmap) -> None:
        """Fill ``out`` (uint64, contiguous, one bit a page) with the slot's dirty bits (api.rst 4.8).

        In manual mode this only reads: a second call returns the same bits and those dirtied since. Otherwise it also
        clears them. Raises UsageError for a buffer that does not fit, KvmError if the slot is not logged.
        """
        need = words(self.region(slot).pages)
        _check_bitmap(out, need)
        if not out.flags.writeable:
            raise UsageError("a dirty bitmap to be filled must be writable")
        self._set(Request.KVM_GET_DIRTY_LOG, KvmDirtyLog(slot=slot, dirty_bitmap=out.ctypes.data))

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: Bitmap) -> None:
        """Clear, and protect again, the pages whose bits are set in ``bitmap`` (api.rst 4.117, manual mode only).

        Bit 0 stands for ``first_page``, which is a multiple of 64; so is ``num_pages`` unless the range ends the slot.
        Bits of pages that are clean in the kernel do nothing. The pages may be read once this has returned.
        Raises UsageError for a range that is not aligned or leaves the slot.
        """
        pages = self.region(slot).pages
        if first_page % 64 or first_page < 0:
            raise UsageError(f"first_page must be a multiple of 64, not {first_page}")
        if num_pages < 0 or first_page + num_pages > pages:
            raise UsageError(f"pages {first_page} to {first_page + num_pages} leave slot {slot}, which has {pages}")
        if num_pages % 64 and first_page + num_pages != pages:
            raise UsageError(f"num_pages must be a multiple of 64 or end the slot, not {num_pages}")
        _check_bitmap(bitmap, words(num_pages))
        if not num_pages:
            return
        argument = KvmClearDirtyLog(
            slot=slot, num_pages=num_pages, first_page=first_page, dirty_bitmap=bitmap.ctypes.data
        )
        self._set(Request.KVM_CLEAR_DIRTY_LOG, argument)


def _check_bitmap(bitmap: Bitmap, need: int) -> None:
    if bitmap.dtype != np.uint64 or bitmap.ndim != 1 or not bitmap.flags.c_contiguous:
        raise UsageError("a dirty bitmap is a contiguous one-dimensional array of uint64")
    if len(bitmap) < need:
        raise UsageError(f"the dirty bitmap has {len(bitmap)} words, {need} are needed")
