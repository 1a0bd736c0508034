"""How kernel structures are written down here: annotated classes whose size is asserted when they are defined."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Annotated, Any, Self, TypeVar, get_args, get_type_hints

u8 = Annotated[int, ctypes.c_uint8]
u16 = Annotated[int, ctypes.c_uint16]
u32 = Annotated[int, ctypes.c_uint32]
s64 = Annotated[int, ctypes.c_int64]
u64 = Annotated[int, ctypes.c_uint64]

if sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
    raise ImportError("amig.kvm speaks the KVM ABI of x86-64 only")


class KvmStruct(ctypes.Structure):
    """Base of the kernel's structures."""

    @classmethod
    def from_blob(cls, blob: bytes) -> Self:
        """A structure holding a copy of ``blob``, which must have exactly its size (else ValueError)."""
        if len(blob) != ctypes.sizeof(cls):
            raise ValueError(f"{cls.__name__} takes {ctypes.sizeof(cls)} bytes, got {len(blob)}")
        return cls.from_buffer_copy(blob)


class KvmUnion(ctypes.Union):
    """Base of the kernel's unions."""


_T = TypeVar("_T", bound=KvmStruct | KvmUnion)


def _c_type(hint: Any) -> Any:
    """The ctypes type behind an annotation: the second half of ``Annotated``, or a nested structure itself."""
    return get_args(hint)[-1] if hasattr(hint, "__metadata__") else hint


def kernel(size: int) -> Callable[[type[_T]], type[_T]]:
    """Lay a class out from its annotations; ``size`` is the kernel's ``sizeof``.

    A definition whose size differs from the kernel's can't even be imported, so no ioctl ever runs with one.
    """

    def lay_out(cls: type[_T]) -> type[_T]:
        hints = get_type_hints(cls, include_extras=True)
        cls._fields_ = [(name, _c_type(hints[name])) for name in cls.__annotations__]
        if ctypes.sizeof(cls) != size:
            raise AssertionError(f"{cls.__name__} has {ctypes.sizeof(cls)} bytes, the kernel's has {size}")
        return cls

    return lay_out
