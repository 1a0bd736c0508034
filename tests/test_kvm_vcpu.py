"""A vCPU on real KVM: run it, kick it, read and write its registers."""

from __future__ import annotations

import signal
import threading

import pytest

from amig.errors import KvmError, UsageError
from amig.kvm.abi_numbers import ExitReason, MpState
from amig.kvm.abi_run import EXIT_AT, IO_EXIT, IO_OUT
from amig.kvm.cpuid import CpuModel
from tests.conftest import standard_kvm
from tests.tinyguest import CODE, HALT, SPIN, TinyGuest

pytestmark = pytest.mark.kvm

MSR_STAR = 0xC0000081
NO_SUCH_MSR = 0x12345678


def test_a_port_write_leaves_the_guest_with_its_particulars() -> None:
    with TinyGuest(bytes.fromhex("b042 e680 f4")) as guest:  # mov al, 0x42; out 0x80, al; hlt
        assert guest.vcpu.run() is ExitReason.IO
        direction, size, port, count, at = IO_EXIT.unpack_from(guest.vcpu.run_page, EXIT_AT)
        assert (direction, size, port, count) == (IO_OUT, 1, 0x80, 1)
        assert guest.vcpu.run_page[at] == 0x42
        io = guest.vcpu.kvm_run().exit.io
        assert (io.port, io.size, io.data_offset) == (0x80, 1, at)
        assert guest.vcpu.exit_number() == ExitReason.IO
        assert guest.vcpu.run() is ExitReason.HLT


def test_immediate_exit_completes_what_is_pending_and_enters_no_guest() -> None:
    with TinyGuest(bytes.fromhex("e480 f4")) as guest:  # in al, 0x80; hlt
        assert guest.vcpu.run() is ExitReason.IO
        at = guest.vcpu.kvm_run().exit.io.data_offset
        guest.vcpu.run_page[at] = 0x77
        guest.vcpu.set_immediate_exit(True)
        assert guest.vcpu.run() is None
        regs = guest.vcpu.get_regs()
        assert (regs.rax & 0xFF, regs.rip) == (0x77, CODE + 2)
        guest.vcpu.set_immediate_exit(False)
        assert guest.vcpu.run() is ExitReason.HLT


def test_a_signal_ends_a_run_that_would_last_for_ever() -> None:
    number = signal.SIGRTMIN + 7
    ready, result = threading.Event(), list[ExitReason | None]()
    with TinyGuest(SPIN) as guest:

        def body() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, (number,))
            guest.vcpu.set_signal_mask(set(range(1, 65)) - {number})
            ready.set()
            result.append(guest.vcpu.run())
            assert signal.sigtimedwait((number,), 0) is not None  # still pending
            result.append(guest.vcpu.run())

        thread = threading.Thread(target=body)
        thread.start()
        ready.wait(30)
        assert thread.ident is not None
        signal.pthread_kill(thread.ident, number)  # before, in, or at the door of KVM_RUN: it must not matter
        while not result:
            pass
        signal.pthread_kill(thread.ident, number)
        thread.join(30)
    assert result == [None, None]


def test_a_running_vcpu_cannot_be_closed_and_nothing_is_lost_by_trying() -> None:
    number = signal.SIGRTMIN + 7
    ready = threading.Event()
    with TinyGuest(SPIN) as guest:

        def body() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, (number,))
            guest.vcpu.set_signal_mask(set(range(1, 65)) - {number})
            ready.set()
            guest.vcpu.run()

        thread = threading.Thread(target=body)
        thread.start()
        ready.wait(30)
        while not guest.vcpu._running:
            pass
        with pytest.raises(KvmError, match="vCPU 0 runs: stop its thread"):
            guest.vm.close()
        assert not guest.vcpu.closed
        assert thread.ident is not None
        signal.pthread_kill(thread.ident, number)
        thread.join(30)
        assert not thread.is_alive()
    assert guest.vcpu.closed


def test_registers_keep_what_is_written() -> None:
    with TinyGuest(HALT, irqchip=True) as guest:
        vcpu = guest.vcpu
        regs = vcpu.get_regs()
        regs.r15, regs.rax = 0xDEAD_BEEF_0123_4567, (1 << 64) - 1
        vcpu.set_regs(regs)
        assert bytes(vcpu.get_regs()) == bytes(regs)
        sregs = vcpu.get_sregs()
        sregs.cr2 = 0xABC000
        vcpu.set_sregs(sregs)
        assert vcpu.get_sregs().cr2 == 0xABC000
        sregs2 = vcpu.get_sregs2()
        assert sregs2.cr2 == 0xABC000
        sregs2.cr2 = 0xDEF000
        vcpu.set_sregs2(sregs2)
        assert vcpu.get_sregs2().cr2 == 0xDEF000
        fpu = vcpu.get_fpu()
        fpu.fcw, fpu.mxcsr = 0x27F, 0x1FA0
        vcpu.set_fpu(fpu)
        assert vcpu.get_fpu().fcw == 0x27F
        xsave = bytearray(vcpu.get_xsave())
        assert len(xsave) == vcpu.xsave_size
        xsave[160 + 5] = 0x55  # XMM0 lies at 160
        xsave[512] |= 2  # SSE is in use
        vcpu.set_xsave(bytes(xsave))
        assert vcpu.get_xsave() == xsave
        assert vcpu.get_fpu().xmm[5] == 0x55
        with pytest.raises(UsageError, match="this host takes"):
            vcpu.set_xsave(bytes(xsave) + bytes(4))
        vcpu.set_xcrs(vcpu.get_xcrs())
        debugregs = vcpu.get_debugregs()
        debugregs.db[1] = 0x1234
        vcpu.set_debugregs(debugregs)
        assert vcpu.get_debugregs().db[1] == 0x1234
        lapic = vcpu.get_lapic()
        lapic.regs[0x80] = 0x20  # task priority
        vcpu.set_lapic(lapic)
        assert vcpu.get_lapic().regs[0x80] == 0x20
        vcpu.set_mp_state(MpState.HALTED)
        assert vcpu.get_mp_state() is MpState.HALTED
        events = vcpu.get_vcpu_events()
        events.nmi_pending = 1
        vcpu.set_vcpu_events(events)
        assert vcpu.get_vcpu_events().nmi_pending == 1
        assert vcpu.get_tsc_khz() > 100_000


def test_msrs_are_read_and_written_in_batches_and_refusals_reported() -> None:
    with TinyGuest(HALT) as guest:
        values, failed = guest.vcpu.get_msrs([MSR_STAR, NO_SUCH_MSR, 0x10, NO_SUCH_MSR + 1])
        assert sorted(values) == [0x10, MSR_STAR]
        assert failed == [NO_SUCH_MSR, NO_SUCH_MSR + 1]
        assert guest.vcpu.set_msrs([(NO_SUCH_MSR, 1), (MSR_STAR, 0x1122), (NO_SUCH_MSR, 2)]) == [NO_SUCH_MSR] * 2
        assert guest.vcpu.get_msrs([MSR_STAR] * 600)[0] == {MSR_STAR: 0x1122}
        assert guest.vcpu.get_msrs([]) == ({}, [])


def test_cpuid_is_what_was_set() -> None:
    with TinyGuest(HALT) as guest:
        entries = CpuModel.host(guest.kvm.supported_cpuid(), hide=["sse3"]).for_vcpu(0, 1)
        guest.vcpu.set_cpuid2(entries)
        there = {(entry.leaf, entry.subleaf): entry for entry in guest.vcpu.get_cpuid2()}
        # A leaf of zeros says what a missing one says, and some KVMs leave it out (those of AMX, where guests lack it).
        said = {(entry.leaf, entry.subleaf) for entry in entries if any(entry[3:])}
        assert said <= set(there) <= {(entry.leaf, entry.subleaf) for entry in entries}
        assert guest.vcpu.cpuid == entries
        if standard_kvm():  # a software KVM can't intercept CPUID and shows the processor's own
            assert there[1, 0].ecx & 1 == 0
