"""The serial port, held to what its data sheet promises."""

import msgspec
import pytest

from amig.host.serial import BACKLOG_BYTES, FIFO_BYTES, Serial16550, SerialState

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
RDI, THRI, RLSI, MSI = 1, 2, 4, 8
OUT2, LOOP = 8, 16


class Port(Serial16550):
    def __init__(self):
        self.out = bytearray()
        self.levels = []
        super().__init__(irq=self.levels.append, sink=self.out.extend)

    def put(self, offset, value):
        self.write(offset, bytes([value]))


@pytest.fixture
def port():
    return Port()


def test_what_the_guest_writes_reaches_the_sink(port):
    port.put(THR, 65)
    port.write(THR, b"BCD")
    assert port.out == b"ABCD"
    assert port.read(LSR) & 0x60 == 0x60, "the transmitter is empty"


def test_the_divisor_lies_behind_dlab(port):
    port.put(LCR, 0x83)
    port.put(DLL, 1)
    port.put(DLM, 2)
    assert (port.read(DLL), port.read(DLM), port.out) == (1, 2, b"")
    port.put(LCR, 0x03)
    port.put(IER, 0)
    assert port.read(IER) == 0
    assert port.read(RBR) == 0


def test_registers_hold_what_they_can(port):
    for register, mask in [(LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF)]:
        port.put(register, 0xFF)
        assert port.read(register) == mask
        port.put(register, 0)
    port.put(IER, 0xFF)
    assert port.read(IER) == 0x0F


def test_a_driver_finds_a_16550a(port):
    assert port.read(IIR) == 0x01
    port.put(FCR, 1)
    assert port.read(IIR) == 0xC1
    port.put(FCR, 0)
    assert port.read(IIR) == 0x01


def test_input_is_read_in_order_through_the_fifo(port):
    port.put(FCR, 1)
    text = bytes(range(100))
    assert port.input(text) == 100
    seen = bytearray()
    while port.read(LSR) & 1:
        seen.append(port.read(RBR))
    assert seen == text


def test_input_without_fifos_comes_byte_by_byte(port):
    port.input(b"xyz")
    assert [port.read(RBR) for _ in range(4)] == [*b"xyz", 0]


def test_input_is_bounded_and_says_how_much_it_took(port):
    port.put(FCR, 1)
    assert port.input(bytes(BACKLOG_BYTES - 1)) == BACKLOG_BYTES - 1
    assert port.input(bytes(BACKLOG_BYTES)) == 1 + FIFO_BYTES
    assert port.input(b"more") == 0


def test_received_data_interrupts_at_the_trigger_and_times_out_below(port):
    port.put(MCR, OUT2)
    port.put(FCR, 0x81)  # trigger at 8
    port.put(IER, RDI)
    port.input(b"1234567")
    assert (port.read(IIR), port.levels) == (0xCC, [True])
    port.input(b"8")
    assert port.read(IIR) == 0xC4
    for _ in range(8):
        port.read(RBR)
    assert (port.read(IIR), port.levels) == (0xC1, [True, False])


def test_an_empty_transmitter_interrupts_when_enabled_and_after_each_write(port):
    port.put(MCR, OUT2)
    port.put(IER, THRI)
    assert port.levels == [True]
    assert port.read(IIR) == 0x02
    assert port.levels == [True, False], "reading IIR acknowledges it"
    assert port.read(IIR) == 0x01
    port.put(THR, 1)
    assert port.levels == [True, False, True]
    port.put(THR, 2)
    assert port.levels == [True, False, True, False, True], "a new edge for each write"
    port.put(IER, 0)
    assert port.levels[-1] is False


def test_data_goes_before_the_transmitter_interrupt(port):
    port.put(IER, RDI | THRI)
    port.input(b"a")
    assert port.read(IIR) == 0x04
    port.read(RBR)
    assert port.read(IIR) == 0x02


def test_the_interrupt_needs_out2(port):
    port.put(IER, THRI)
    assert port.levels == []
    port.put(MCR, OUT2)
    assert port.levels == [True]
    port.put(MCR, OUT2 | LOOP)
    assert port.levels == [True, False]


def test_loopback_ties_outputs_to_inputs_as_linux_probes_it(port):
    port.put(MCR, LOOP | OUT2 | 0x02)
    assert port.read(MSR) & 0xF0 == 0x90
    port.put(MCR, LOOP | 0x01 | 0x04)
    assert port.read(MSR) & 0xF0 == 0x60
    port.put(THR, 0x5A)
    assert port.out == b""
    assert port.read(RBR) == 0x5A
    port.put(MCR, 0)
    assert port.read(MSR) & 0xF0 == 0xB0


def test_modem_changes_are_told_once(port):
    port.put(MCR, LOOP)
    assert port.read(MSR) == 0x0B, "CTS, DSR, DCD fell"
    assert port.read(MSR) == 0
    port.put(MCR, LOOP | 0x04)
    assert port.read(MSR) == 0x40, "only the trailing edge of RI counts"
    port.put(IER, MSI)
    port.put(MCR, LOOP)
    assert port.read(IIR) == 0x00
    assert port.read(MSR) == 0x04
    assert port.read(IIR) == 0x01


def test_host_input_waits_while_in_loopback(port):
    port.put(MCR, LOOP)
    port.input(b"k")
    assert port.read(LSR) & 1 == 0
    port.put(MCR, 0)
    assert port.read(RBR) == ord("k")


def test_a_full_fifo_in_loopback_overruns_and_says_so(port):
    port.put(FCR, 1)
    port.put(MCR, LOOP)
    port.put(IER, RLSI)
    port.write(THR, bytes(FIFO_BYTES + 1))
    assert port.read(IIR) == 0xC6
    assert port.read(LSR) & 2
    assert port.read(LSR) & 2 == 0


def test_clearing_the_fifo_drops_only_what_is_in_it(port):
    port.put(FCR, 1)
    port.input(bytes(range(20)))
    port.put(FCR, 3)
    assert port.read(RBR) == 16


def test_state_moves_with_unread_input_and_the_interrupt(port):
    port.put(MCR, OUT2)
    port.put(FCR, 0x41)
    port.put(LCR, 0x03)
    port.put(IER, RDI | THRI)
    port.put(SCR, 0x42)
    port.input(bytes(range(50)))
    wire = msgspec.msgpack.encode(port.save())
    other = Port()
    other.load(msgspec.msgpack.decode(wire, type=SerialState))
    assert other.levels == [True]
    assert other.read(SCR) == 0x42
    assert bytes(other.read(RBR) for _ in range(50)) == bytes(range(50))
    assert other.read(IIR) == 0xC2
    assert other.levels == [True, False]
    other.load(SerialState())
    assert other.levels[-1] is False, "the line is driven even where nothing changes"
    assert len(other.levels) == 3


@pytest.mark.parametrize("field", [{"ier": 256}, {"fifo": bytes(17)}, {"backlog": bytes(BACKLOG_BYTES + 1)}, {"x": 1}])
def test_state_from_outside_is_checked(field):
    wire = msgspec.msgpack.encode(field)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(wire, type=SerialState)
