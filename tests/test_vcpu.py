"""vCPU threads: exits served, clean kicks and pauses, and never a silent end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amig.errors import GuestError, HostError, KvmError
from amig.host.exits import KICK_SIGNAL, GuestStop, MmioBus, PortBus, WaitPort
from amig.host.stopped import EMULATION_HINT, Stopped, StopReason, translate
from amig.host.vcpu import State, VcpuThread
from amig.kvm.abi_numbers import ExitReason
from amig.kvm.abi_run import EXIT_AT, IO_EXIT, IO_OUT
from amig.kvm.abi_vcpu import KvmSregs
from amig.kvm.vcpu import Vcpu
from tests.conftest import standard_kvm
from tests.tinyguest import CODE, HALT, SPIN, TinyGuest

LOOP_OUT = bytes.fromhex("40 e780 ebfb")
"""``again: inc ax; out 0x80, ax; jmp again``"""
LOOP_IN = bytes.fromhex("e580 89c3 43 e781 ebf7")
"""``again: in ax, 0x80; mov bx, ax; inc bx; out 0x81, ax; jmp again``"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Device:
    """Counts what it is asked; ``hold`` makes it block until ``release``."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.values: list[tuple[int, int, int]] = []
        self.entered, self.release = threading.Event(), threading.Event()
        self.hold = False
        self.fail: BaseException | None = None

    def read(self, offset: int, size: int) -> int:
        self.values.append((offset, size, -1))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        if self.hold:
            self.entered.set()
            self.release.wait(60)
        if self.fail:
            raise self.fail
        self.values.append((offset, size, value))


class Rig:
    """A tiny guest on a vCPU thread with a device at ports 0x80 to 0x83."""

    def __init__(self, code: bytes, **options: bool) -> None:
        self.guest = TinyGuest(code, **options)  # type: ignore[arg-type]
        self.device, self.ports, self.mmio = Device(), PortBus(), MmioBus()
        self.ports.add(0x80, 4, self.device)
        self.ends: list[Stopped] = []
        self.ended = threading.Event()
        self.thread = VcpuThread(
            self.guest.vcpu, self.ports, self.mmio, on_stopped=self._on_stopped, read_memory=self.read_memory
        )

    def _on_stopped(self, stopped: Stopped) -> None:
        self.ends.append(stopped)
        self.ended.set()

    def read_memory(self, address: int, size: int) -> bytes | None:
        return self.guest.memory[address : address + size] or None

    def end(self) -> Stopped:
        assert self.ended.wait(60)
        assert self.thread.stopped is self.ends[0]
        return self.ends[0]


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(code: bytes, **options: bool) -> Rig:
        rigs.append(Rig(code, **options))
        return rigs[-1]

    yield make
    for made in rigs:
        made.device.release.set()
        made.thread.stop(60)
        made.guest.close()


pytestmark = pytest.mark.kvm


def test_ports_are_written_and_read(rig: Callable[..., Rig]) -> None:
    r = rig(LOOP_IN)
    r.device.answer = 0x1234
    r.thread.start()
    until(lambda: len(r.device.values) > 4)
    r.thread.stop()
    assert r.device.values[:4] == [(0, 2, -1), (1, 2, 0x1234), (0, 2, -1), (1, 2, 0x1234)]
    assert r.thread.exits >= 4


def test_string_instructions_are_served_element_by_element(rig: Callable[..., Rig]) -> None:
    # mov si, 0x3000; mov cx, 5; mov dx, 0x80; cld; rep outsb; mov di, 0x3100; mov cx, 3; rep insw; hlt
    r = rig(bytes.fromhex("be0030 b90500 ba8000 fc f36e bf0031 b90300 f36d f4"))
    r.device.answer = 0xBEEF
    r.guest.memory[0x3000:0x3005] = b"hello"
    sregs = r.guest.vcpu.get_sregs()
    sregs.ds.base = sregs.ds.selector = sregs.es.base = sregs.es.selector = 0
    r.guest.vcpu.set_sregs(sregs)
    r.thread.start()
    assert r.end().reason is StopReason.HALTED
    writes = bytes(value for _, size, value in r.device.values if size == 1)
    assert writes == b"hello"
    assert [size for _, size, value in r.device.values if value == -1] == [2, 2, 2]
    assert r.guest.memory[0x3100:0x3108] == b"\xef\xbe\xef\xbe\xef\xbe\0\0"


@pytest.mark.parametrize(("direction", "size"), [(IO_OUT, 1), (IO_OUT, 4), (0, 2)])
def test_an_exit_with_several_elements_is_served_whole(rig: Callable[..., Rig], direction: int, size: int) -> None:
    r = rig(HALT)  # today's kernels do so for INS only; their interface allows it for both
    page = r.guest.vcpu.run_page
    IO_EXIT.pack_into(page, EXIT_AT, direction, size, 0x81, 3, 4096)
    data = b"".join(value.to_bytes(size, "little") for value in (7, 8, 9))
    page[4096 : 4096 + len(data)] = data
    r.device.answer = 5
    r.thread._serve_io(page)
    if direction == IO_OUT:
        assert r.device.values == [(1, size, 7), (1, size, 8), (1, size, 9)]
    else:
        assert r.device.values == [(1, size, -1)] * 3
        assert page[4096 : 4096 + len(data)] == (5).to_bytes(size, "little") * 3


def test_memory_mapped_accesses_are_served(rig: Callable[..., Rig]) -> None:
    # mov al, [bx+8]; inc al; mov [bx+9], al; mov ax, [bx+0x10]; hlt, DS where no memory is
    r = rig(bytes.fromhex("8a4708 fec0 884709 8b4710 f4"))
    device = Device(0x41)
    r.mmio.add(0xA_0000, 0x10, device)
    r.guest.vm.delete_memory_region(0)
    r.guest.vm.set_memory_region(0, 0, 0xA_0000, r.guest.address)
    sregs = r.guest.vcpu.get_sregs()
    sregs.ds.selector, sregs.ds.base = 0xA000, 0xA_0000
    r.guest.vcpu.set_sregs(sregs)
    r.guest.start_at(CODE, rbx=0)
    r.thread.start()
    assert r.end().reason is StopReason.HALTED
    assert device.values == [(8, 1, -1), (9, 1, 0x42)]
    assert r.guest.vcpu.get_regs().rax & 0xFFFF == 0xFFFF  # nobody there


def test_a_pause_takes_hold_and_a_resume_lets_it_run_on(rig: Callable[..., Rig]) -> None:
    r = rig(LOOP_OUT)
    r.thread.start()
    for _ in range(30):
        seen = len(r.device.values)
        until(lambda seen=seen: len(r.device.values) > seen)  # type: ignore[misc]
        r.thread.pause()
        assert r.thread.state is State.PAUSED
        count, regs = len(r.device.values), bytes(r.guest.vcpu.get_regs())
        time.sleep(0.001)
        assert (len(r.device.values), bytes(r.guest.vcpu.get_regs())) == (count, regs)
        r.thread.resume()
        assert r.thread.state is not State.PAUSED
    r.thread.stop()
    assert [value for _, _, value in r.device.values] == [n % 65536 for n in range(1, len(r.device.values) + 1)]


def test_a_pause_completes_the_access_that_was_half_done(rig: Callable[..., Rig]) -> None:
    r = rig(LOOP_OUT)
    r.device.hold = True
    r.thread.start()
    assert r.device.entered.wait(60)
    r.thread.request_pause()
    with pytest.raises(HostError, match="did not pause within 0 s: a device handler is stuck"):
        r.thread.wait_paused(0)
    assert r.thread.state is State.RUNNING
    r.device.hold = False
    r.device.release.set()
    r.thread.wait_paused()
    assert r.guest.vcpu.get_regs().rip == CODE + 3  # behind the OUT, not at it
    assert r.device.values == [(0, 2, 1)]


def test_an_input_that_was_half_done_arrives_in_its_register(rig: Callable[..., Rig]) -> None:
    r = rig(bytes.fromhex("e580 ebfc"))  # again: in ax, 0x80; jmp again

    class Pauser(Device):
        def read(self, offset: int, size: int) -> int:
            r.thread.request_pause()
            return 0x4321

    r.ports.add(0x84, 1, Device())
    pauser = Pauser()
    r.ports._table[0x80] = (pauser, 0x80)
    r.thread.start()
    r.thread.wait_paused()
    regs = r.guest.vcpu.get_regs()
    assert (regs.rax & 0xFFFF, regs.rip) == (0x4321, CODE + 2)


def test_a_vcpu_that_never_leaves_the_guest_is_paused_and_stopped(rig: Callable[..., Rig]) -> None:
    r = rig(SPIN)
    r.thread.start()
    for _ in range(10):
        r.thread.pause()
        r.thread.resume()
    r.thread.stop()
    assert (r.thread.state, r.thread.stopped, r.ends) == (State.STOPPED, None, [])


def test_a_halted_vcpu_in_the_kernel_is_paused(rig: Callable[..., Rig]) -> None:
    r = rig(HALT, irqchip=True)
    r.thread.start()
    r.thread.pause()
    r.thread.resume()
    r.thread.pause()
    assert not r.ends


def test_a_vcpu_started_paused_has_not_run(rig: Callable[..., Rig]) -> None:
    r = rig(LOOP_OUT)
    r.thread.start(paused=True)
    assert (r.thread.state, r.device.values) == (State.PAUSED, [])
    assert r.guest.vcpu.get_regs().rip == CODE
    r.thread.resume()
    until(lambda: bool(r.device.values))


def test_a_kick_alone_changes_nothing(rig: Callable[..., Rig]) -> None:
    r = rig(LOOP_OUT)
    r.thread.start()
    for _ in range(200):
        r.thread.kick()
    seen = len(r.device.values)
    until(lambda: len(r.device.values) > seen)
    r.thread.stop()
    r.thread.kick()  # its thread is gone
    assert [value for _, _, value in r.device.values] == [n % 65536 for n in range(1, len(r.device.values) + 1)]


def test_a_pause_ends_a_wait_at_once(rig: Callable[..., Rig]) -> None:
    # mov eax, 0xffffffff; mov dx, 0xa310; again: out dx, eax; jmp again
    r = rig(bytes.fromhex("66b8ffffffff ba10a3 66ef ebfc"))
    waits = 0

    class Counting(WaitPort):
        def write(self, offset: int, size: int, value: int) -> None:
            nonlocal waits
            waits += 1
            super().write(offset, size, value)

    Counting().add_to(r.ports)
    r.thread.start()
    seen, start = 0, time.monotonic()
    for _ in range(40):  # four seconds, if each pause waited for the wait's end
        until(lambda seen=seen: waits > seen)  # type: ignore[misc]
        r.thread.pause()
        seen = waits
        r.thread.resume()
    assert waits > 10 * (time.monotonic() - start)  # more than ten waits of a tenth of a second in a second


def test_pausing_and_resuming_from_many_threads_ends_well(rig: Callable[..., Rig]) -> None:
    r = rig(LOOP_OUT)
    r.thread.start()

    def worry() -> None:
        for _ in range(50):
            r.thread.request_pause()
            r.thread.kick()
            r.thread.resume()

    threads = [threading.Thread(target=worry) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    r.thread.resume()
    seen = len(r.device.values)
    until(lambda: len(r.device.values) > seen)


def test_halt_without_interrupt_controllers_is_an_end(rig: Callable[..., Rig]) -> None:
    r = rig(HALT)
    r.thread.start()
    stopped = r.end()
    assert stopped.reason is StopReason.HALTED
    assert stopped.in_order
    assert "rip 0000000000001001" in stopped.registers
    assert r.thread.state is State.STOPPED
    r.thread.pause()
    r.thread.resume()
    r.thread.stop()
    with pytest.raises(HostError, match="was started before"):
        r.thread.start()


def test_a_triple_fault_is_reported_with_registers(rig: Callable[..., Rig]) -> None:
    r = rig(bytes.fromhex("0f0b"))  # ud2 in protected mode, and no vector table
    sregs = r.guest.vcpu.get_sregs()
    sregs.cr0 |= 1
    sregs.idt.limit = 0
    for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
        segment.base, segment.limit, segment.g, segment.db, segment.s, segment.present = 0, 0xFFFFFFFF, 1, 1, 1, 1
        segment.selector, segment.type = 0x10, 3
    sregs.cs.selector, sregs.cs.type = 8, 11
    r.guest.vcpu.set_sregs(sregs)
    r.thread.start()
    stopped = r.end()
    assert stopped.reason is StopReason.SHUTDOWN
    assert "triple fault" in stopped.text
    error = stopped.error()
    assert isinstance(error, GuestError)
    assert str(error).startswith("vCPU 0 stopped: ")
    for name in ("rip", "rsp", "rflags", "r15", "cr0", "cr3", "efer", "cs", "tr"):
        assert f"{name} " in str(error)


def test_a_guest_may_end_by_its_own_wish(rig: Callable[..., Rig]) -> None:
    r = rig(LOOP_OUT)
    r.device.fail = GuestStop("the guest switched itself off")
    r.thread.start()
    stopped = r.end()
    assert (stopped.reason, stopped.in_order, stopped.text) == (
        StopReason.REQUESTED,
        True,
        "the guest switched itself off",
    )


def test_a_handler_that_fails_stops_the_guest_and_says_so(rig: Callable[..., Rig]) -> None:
    r = rig(LOOP_OUT)
    r.device.fail = ZeroDivisionError("oops")
    r.thread.start()
    stopped = r.end()
    assert (stopped.reason, stopped.text) == (StopReason.HOST_ERROR, "ZeroDivisionError: oops")
    assert stopped.error().__cause__ is r.device.fail
    assert not stopped.in_order


def exit_with(monkeypatch: pytest.MonkeyPatch, reason: ExitReason, body: bytes) -> None:
    """Let the next KVM_RUN end with ``reason`` and ``body`` as the exit's particulars."""

    def run(self: Vcpu) -> ExitReason:
        self.run_page[8:12] = int(reason).to_bytes(4, "little")
        self.run_page[32 : 32 + len(body)] = body
        return reason

    monkeypatch.setattr(Vcpu, "run", run)


@pytest.mark.parametrize(
    ("reason", "body", "kind", "text"),
    [
        (ExitReason.FAIL_ENTRY, b"\x21\0\0\x80", StopReason.FAIL_ENTRY, r"hardware reason 0x80000021"),
        (ExitReason.SYSTEM_EVENT, b"\x03\0\0\0", StopReason.SYSTEM_EVENT, r"system event 3"),
        (
            ExitReason.INTERNAL_ERROR,
            b"\3\0\0\0\1\0\0\0\x2a",
            StopReason.INTERNAL_ERROR,
            r"3 \(delivery_ev\), data \[0x2a\]",
        ),
        (ExitReason.INTERNAL_ERROR, b"\x63" + bytes(7), StopReason.INTERNAL_ERROR, r"99 \(unknown\), data \[\]"),
        (ExitReason.DEBUG, b"", StopReason.UNKNOWN_EXIT, r"does not handle \(4, DEBUG\)"),
        (ExitReason.DIRTY_RING_FULL, b"", StopReason.UNKNOWN_EXIT, r"\(31, DIRTY_RING_FULL\)"),
        (
            ExitReason.INTERNAL_ERROR,
            b"\1\0\0\0\3\0\0\0" + b"\1" + bytes(7) + b"\3\x0f\xc7\x08",
            StopReason.INTERNAL_ERROR,
            r"failed \[0f c7 08\]; this KVM can't emulate that instruction",
        ),
        (
            ExitReason.INTERNAL_ERROR,
            b"\1" + bytes(7),
            StopReason.INTERNAL_ERROR,
            r"failed \[40 e7 80 eb fb( 00){10}\]; this KVM can't emulate",
        ),
    ],
)
def test_every_other_exit_is_an_end_with_its_reason(
    rig: Callable[..., Rig],
    monkeypatch: pytest.MonkeyPatch,
    reason: ExitReason,
    body: bytes,
    kind: StopReason,
    text: str,
) -> None:
    r = rig(LOOP_OUT)
    exit_with(monkeypatch, reason, body)
    r.thread.start()
    stopped = r.end()
    assert stopped.reason is kind
    assert stopped.registers
    with pytest.raises(GuestError, match=text):
        raise stopped.error()


def test_an_instruction_that_can_not_be_emulated_shows_its_bytes(rig: Callable[..., Rig]) -> None:
    if standard_kvm():
        pytest.skip("a standard KVM runs every instruction")
    r = rig(bytes.fromhex("660f3a63c000"))  # pcmpistri xmm0, xmm0, 0
    r.thread.start()
    stopped = r.end()
    assert stopped.reason is StopReason.INTERNAL_ERROR
    assert EMULATION_HINT in stopped.text
    assert "[66 0f 3a 63 c0 00" in stopped.text


def test_a_failing_ioctl_is_an_end_too(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Vcpu) -> ExitReason:
        raise KvmError("KVM_RUN failed: EFAULT", request="KVM_RUN", errno=14)

    r = rig(LOOP_OUT)
    monkeypatch.setattr(Vcpu, "run", run)
    r.thread.start()
    assert r.end().text == "KvmError: KVM_RUN failed: EFAULT"


def test_a_full_dirty_ring_goes_to_its_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    with TinyGuest(LOOP_OUT) as guest:
        thread = VcpuThread(guest.vcpu, PortBus(), MmioBus(), on_dirty_ring_full=lambda vcpu: calls.append(vcpu.index))
        exit_with(monkeypatch, ExitReason.DIRTY_RING_FULL, b"")
        thread.start()
        until(lambda: len(calls) > 3)
        monkeypatch.undo()
        thread.stop()
    assert set(calls) == {0}


def test_a_callback_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def fail(stopped: Stopped) -> None:
        raise ZeroDivisionError

    with TinyGuest(HALT) as guest:
        thread = VcpuThread(guest.vcpu, PortBus(), MmioBus(), on_stopped=fail)
        thread.start()
        until(lambda: "on_stopped failed" in caplog.text)
        thread.stop()


def test_a_thread_that_was_never_started_can_be_stopped() -> None:
    with TinyGuest(HALT) as guest:
        thread = VcpuThread(guest.vcpu, PortBus(), MmioBus())
        thread.kick()
        thread.stop()
        assert thread.state is State.STOPPED
        with pytest.raises(HostError, match="was started before"):
            thread.start()


def test_the_process_keeps_its_own_signals(rig: Callable[..., Rig]) -> None:
    handler = signal.getsignal(KICK_SIGNAL)
    r = rig(SPIN)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    r.thread.start()
    assert (signal.getsignal(KICK_SIGNAL), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == (handler, before)
    r.thread.pause()  # inside KVM_RUN another mask is in force
    threads = {path.name: path for path in Path("/proc/self/task").iterdir()}
    native = r.thread._thread.native_id
    blocked = next(
        int(line.split()[1], 16)
        for line in (threads[str(native)] / "status").read_text().splitlines()
        if line.startswith("SigBlk")
    )
    assert blocked >> (KICK_SIGNAL - 1) & 1
    assert blocked >> (signal.SIGINT - 1) & 1  # Ctrl-C goes to the main thread


def table(memory: dict[int, bytes]) -> Callable[[int, int], bytes | None]:
    return lambda address, size: memory.get(address, bytes(size))


def test_addresses_are_translated_through_long_mode_tables() -> None:
    sregs = KvmSregs(cr0=1 << 31, cr3=0x1000, efer=1 << 10)
    memory = {
        0x1000 + 8 * 1: (0x2000 | 1).to_bytes(8, "little"),
        0x2000 + 8 * 2: (0x3000 | 1).to_bytes(8, "little"),
        0x2000 + 8 * 3: (0x4000_0000 | 0x81).to_bytes(8, "little"),
        0x3000 + 8 * 4: (0x4000 | 1).to_bytes(8, "little"),
        0x3000 + 8 * 5: (0x0A0_0000 | 0x81).to_bytes(8, "little"),
        0x4000 + 8 * 6: (0x5000 | 1 | 1 << 63).to_bytes(8, "little"),
    }
    read = table(memory)
    top = 1 << 39
    assert translate(top | 2 << 30 | 4 << 21 | 6 << 12 | 0x123, sregs, read) == 0x5123
    assert translate(top | 2 << 30 | 5 << 21 | 6 << 12 | 0x123, sregs, read) == 0x0A0_6123
    assert translate(top | 3 << 30 | 5 << 21 | 6 << 12 | 0x123, sregs, read) == 0x4000_0000 | 5 << 21 | 6 << 12 | 0x123
    assert translate(top | 4 << 30, sregs, read) is None
    assert translate(0x777, KvmSregs(), read) == 0x777
    assert translate(0x777, KvmSregs(cr0=1 << 31), read) is None
    assert translate(top, sregs, lambda address, size: None) is None
