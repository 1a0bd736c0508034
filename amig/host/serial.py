"""A 16550A serial port: registers, FIFOs and interrupts; source: National Semiconductor PC16550D data sheet.

The transmitter is never busy: what the guest writes is handed to the sink at once. Input waits in a bounded backlog and
moves into the 16-byte FIFO as the guest reads, so that a person typing ahead loses nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated

import msgspec

COM1_BASE = 0x3F8
COM1_IRQ = 4
PORTS = 8

FIFO_BYTES = 16
BACKLOG_BYTES = 64 << 10

_IER_RDI, _IER_THRI, _IER_RLSI, _IER_MSI = 1, 2, 4, 8
_IIR_NONE, _IIR_MSI, _IIR_THRI, _IIR_RDI, _IIR_RLSI, _IIR_TIMEOUT, _IIR_FIFO = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C, 0xC0
_FCR_ENABLE, _FCR_CLEAR_RX, _FCR_KEPT = 0x01, 0x02, 0xC9
_LCR_DLAB = 0x80
_MCR_DTR, _MCR_RTS, _MCR_OUT1, _MCR_OUT2, _MCR_LOOP, _MCR_KEPT = 0x01, 0x02, 0x04, 0x08, 0x10, 0x1F
_LSR_DATA, _LSR_OVERRUN, _LSR_THRE, _LSR_TEMT = 0x01, 0x02, 0x20, 0x40
_MSR_CTS, _MSR_DSR, _MSR_RI, _MSR_DCD = 0x10, 0x20, 0x40, 0x80
_MSR_CONNECTED = _MSR_CTS | _MSR_DSR | _MSR_DCD
_TRIGGER = (1, 4, 8, 14)

Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]


class SerialState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a serial port remembers; travels in a migration, with the input that the guest has not read yet."""

    ier: Byte = 0
    fcr: Byte = 0
    lcr: Byte = 0
    mcr: Byte = 0
    scr: Byte = 0
    dll: Byte = 12
    dlm: Byte = 0
    lsr_errors: Byte = 0
    msr: Byte = _MSR_CONNECTED
    thr_interrupt: bool = False
    fifo: Annotated[bytes, msgspec.Meta(max_length=FIFO_BYTES)] = b""
    backlog: Annotated[bytes, msgspec.Meta(max_length=BACKLOG_BYTES)] = b""


class Serial16550:
    """The port. ``irq(level)`` drives its interrupt line; ``sink(data)`` takes what the guest writes, at once.

    Registers are accessed from vCPU threads, `input` comes from any: every method is thread-safe. ``irq`` and ``sink``
    are called with the port's lock held and must not block.
    """

    def __init__(self, *, irq: Callable[[bool], None], sink: Callable[[bytes], None]) -> None:
        self._irq = irq
        self._sink = sink
        self._lock = threading.Lock()
        self._level = False
        self._take(SerialState())

    def read(self, offset: int) -> int:
        """Read register ``offset`` (0 to 7), with what reading does to it."""
        with self._lock:
            value = self._read(offset)
            self._update()
            return value

    def write(self, offset: int, data: bytes) -> None:
        """Write the bytes of ``data``, one after the other, to register ``offset`` (a string instruction has many)."""
        with self._lock:
            if offset == 0 and not self._lcr & _LCR_DLAB:
                self._transmit(data)
            else:
                for value in data:
                    self._write(offset, value)
            self._update()

    def input(self, data: bytes) -> int:
        """Queue input for the guest; returns how many bytes there was room for (the rest is dropped)."""
        with self._lock:
            room = min(len(data), BACKLOG_BYTES - len(self._backlog))
            self._backlog += data[:room]
            self._update()
            return room

    def save(self) -> SerialState:
        """Return all state."""
        with self._lock:
            return SerialState(
                ier=self._ier,
                fcr=self._fcr,
                lcr=self._lcr,
                mcr=self._mcr,
                scr=self._scr,
                dll=self._dll,
                dlm=self._dlm,
                lsr_errors=self._lsr_errors,
                msr=self._msr,
                thr_interrupt=self._thr_interrupt,
                fifo=bytes(self._fifo),
                backlog=bytes(self._backlog),
            )

    def load(self, state: SerialState) -> None:
        """Take ``state`` over and drive the interrupt line as it says, also where it does not seem to change."""
        with self._lock:
            self._take(state)
            self._refill()
            self._level = self._pending() != _IIR_NONE and self._wired()
            self._irq(self._level)

    def _take(self, state: SerialState) -> None:
        self._ier, self._fcr, self._lcr, self._mcr = state.ier & 0x0F, state.fcr & _FCR_KEPT, state.lcr, state.mcr
        self._scr, self._dll, self._dlm = state.scr, state.dll, state.dlm
        self._lsr_errors, self._msr, self._thr_interrupt = state.lsr_errors, state.msr, state.thr_interrupt
        self._fifo, self._backlog = bytearray(state.fifo), bytearray(state.backlog)

    def _read(self, offset: int) -> int:
        divisor = bool(self._lcr & _LCR_DLAB)
        value = 0
        if offset == 0 and divisor:
            value = self._dll
        elif offset == 0:
            value = self._fifo.pop(0) if self._fifo else 0
        elif offset == 1:
            value = self._dlm if divisor else self._ier
        elif offset == 2:
            value = self._pending()
            if value == _IIR_THRI:
                self._thr_interrupt = False
            if self._fcr & _FCR_ENABLE:
                value |= _IIR_FIFO
        elif offset == 3:
            value = self._lcr
        elif offset == 4:
            value = self._mcr
        elif offset == 5:
            value = _LSR_THRE | _LSR_TEMT | self._lsr_errors | (_LSR_DATA if self._fifo else 0)
            self._lsr_errors = 0
        elif offset == 6:
            value = self._msr
            self._msr &= 0xF0
        elif offset == 7:
            value = self._scr
        return value

    def _write(self, offset: int, value: int) -> None:
        divisor = bool(self._lcr & _LCR_DLAB)
        if offset == 0:
            self._dll = value
        elif offset == 1 and divisor:
            self._dlm = value
        elif offset == 1:
            if (self._ier ^ value) & _IER_THRI:  # enabling it while the transmitter is empty interrupts at once
                self._thr_interrupt = bool(value & _IER_THRI)
            self._ier = value & 0x0F
        elif offset == 2:
            if (self._fcr ^ value) & _FCR_ENABLE or value & _FCR_CLEAR_RX:
                self._fifo.clear()
            self._fcr = value & _FCR_KEPT if value & _FCR_ENABLE else 0
        elif offset == 3:
            self._lcr = value
        elif offset == 4:
            self._mcr = value & _MCR_KEPT
            self._modem_lines()
        elif offset == 7:
            self._scr = value

    def _transmit(self, data: bytes) -> None:
        if self._mcr & _MCR_LOOP:
            room = max(self._capacity() - len(self._fifo), 0)
            self._fifo += data[:room]
            if len(data) > room:
                self._lsr_errors |= _LSR_OVERRUN
        else:
            self._sink(data)
        # The interrupt controller sees edges: the line falls while the byte is on its way, and rises again.
        self._thr_interrupt = False
        self._update()
        self._thr_interrupt = True

    def _modem_lines(self) -> None:
        lines = _MSR_CONNECTED
        if self._mcr & _MCR_LOOP:  # the outputs are tied to the inputs
            pairs = ((_MCR_RTS, _MSR_CTS), (_MCR_DTR, _MSR_DSR), (_MCR_OUT1, _MSR_RI), (_MCR_OUT2, _MSR_DCD))
            lines = sum(status for control, status in pairs if self._mcr & control)
        before = self._msr & 0xF0
        changed = before ^ lines
        if lines & _MSR_RI:  # only its trailing edge counts
            changed &= ~_MSR_RI
        self._msr = lines | (self._msr & 0x0F) | changed >> 4

    def _capacity(self) -> int:
        return FIFO_BYTES if self._fcr & _FCR_ENABLE else 1

    def _refill(self) -> None:
        room = self._capacity() - len(self._fifo)
        if room > 0 and self._backlog and not self._mcr & _MCR_LOOP:
            self._fifo += self._backlog[:room]
            del self._backlog[:room]

    def _pending(self) -> int:
        if self._ier & _IER_RLSI and self._lsr_errors:
            return _IIR_RLSI
        if self._ier & _IER_RDI and self._fifo:
            trigger = _TRIGGER[self._fcr >> 6] if self._fcr & _FCR_ENABLE else 1
            return _IIR_RDI if len(self._fifo) >= trigger else _IIR_TIMEOUT
        if self._ier & _IER_THRI and self._thr_interrupt:
            return _IIR_THRI
        if self._ier & _IER_MSI and self._msr & 0x0F:
            return _IIR_MSI
        return _IIR_NONE

    def _wired(self) -> bool:
        """On a PC the interrupt reaches the controller through OUT2, which loopback holds inactive."""
        return bool(self._mcr & _MCR_OUT2) and not self._mcr & _MCR_LOOP

    def _update(self) -> None:
        self._refill()
        level = self._pending() != _IIR_NONE and self._wired()
        if level != self._level:
            self._level = level
            self._irq(level)
