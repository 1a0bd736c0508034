"""A KVM descriptor with an owner: calls and close from any thread, without ever using a number that was closed."""

from __future__ import annotations

import ctypes
import os
import threading
from types import TracebackType
from typing import Self, TypeVar

from ..errors import KvmError
from .abi_base import KvmStruct
from .abi_numbers import Request
from .ioctl import ioctl

_S = TypeVar("_S", bound=KvmStruct)


class Handle:
    """Owns ``fd``. ``close`` waits for calls in flight, later calls raise KvmError; both from any thread."""

    def __init__(self, fd: int, what: str) -> None:
        self._fd = fd
        self._what = what
        self._idle = threading.Condition()
        self._in_flight = 0

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._fd < 0

    def _closed_error(self, request: str) -> KvmError:
        return KvmError(f"{request} on a {self._what} that is closed", request=request)

    def _call(self, request: Request, arg: int = 0) -> int:
        with self._idle:
            if self._fd < 0:
                raise self._closed_error(request.name)
            fd = self._fd
            self._in_flight += 1
        try:
            return ioctl(fd, request, arg)
        finally:
            with self._idle:
                self._in_flight -= 1
                if not self._in_flight:
                    self._idle.notify_all()

    def _get(self, request: Request, structure: type[_S]) -> _S:
        value = structure()
        self._call(request, ctypes.addressof(value))
        return value

    def _set(self, request: Request, value: KvmStruct) -> None:
        self._call(request, ctypes.addressof(value))

    def close(self) -> None:
        """Close the descriptor once calls in flight have returned; closing again does nothing."""
        with self._idle:
            fd, self._fd = self._fd, -1
            if fd < 0:
                return
            try:
                self._check_close()
            except BaseException:
                self._fd = fd
                raise
            self._idle.wait_for(lambda: not self._in_flight)
        os.close(fd)

    def _check_close(self) -> None:
        """Raise if it must stay open; called when new calls are already refused."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self._what}{' (closed)' if self.closed else ''}>"
