"""KVM's dirty log, as the hub sees it."""

import numpy as np
import pytest

from amig.errors import KvmUnavailable, UsageError
from amig.host import guest_abi
from tests.machines import MIB, bits, boot, raw, wait_heartbeats, wait_running

pytestmark = pytest.mark.kvm

PAGES = 64 * MIB // 4096


@pytest.fixture(params=[False, True], ids=["", "initially-set"])
def machine(request):
    m = boot("workload=random ws=8M rate=200M", initially_set=request.param)
    m.resume()
    wait_running(m)
    yield m
    m.close()


def get(machine):
    out = np.zeros(PAGES // 64, np.uint64)
    machine.log.get(0, out)
    return out


def working_set(machine):
    ((gpa, pages),) = guest_abi.ws_ranges(guest_abi.parse_status(raw(machine)))
    return slice(gpa // 4096, gpa // 4096 + pages)


def test_a_manual_log_is_read_without_clearing_and_cleared_by_choice(machine):
    log = machine.log
    log.start(0, manual=True)
    if log.abilities.initially_set:
        assert bits(get(machine), PAGES).all()
        log.clear(0, 0, PAGES, np.full(PAGES // 64, ~np.uint64(0)))
    wait_heartbeats(machine)
    machine.pause()
    first = get(machine)
    dirty = bits(first, PAGES)
    ws = working_set(machine)
    assert dirty[ws].any()
    assert not dirty[ws.stop + 64 :].any(), "nothing beyond the working set"
    assert (get(machine) == first).all(), "reading clears nothing"
    chosen = first.copy()
    half = ws.start // 64 + (ws.stop - ws.start) // 128
    chosen[half:] = 0
    log.clear(0, 0, PAGES, chosen)
    assert (get(machine) == first & ~chosen).all()
    log.stop(0)


def test_a_cleared_page_is_dirty_again_when_it_is_written(machine):
    machine.log.start(0, manual=True)
    wait_heartbeats(machine)
    machine.pause()
    machine.log.clear(0, 0, PAGES, np.full(PAGES // 64, ~np.uint64(0)))
    assert not get(machine).any()
    before = raw(machine).copy()
    machine.resume()
    wait_heartbeats(machine)
    machine.pause()
    changed = (before != raw(machine)).reshape(-1, 4096).any(axis=1)
    assert changed.any()
    assert not (changed & ~bits(get(machine), PAGES)).any(), "no changed page is missing"


def test_an_automatic_log_clears_what_it_returns(machine):
    log = machine.log
    log.start(0, manual=False)
    wait_heartbeats(machine)
    machine.pause()
    assert get(machine).any()
    assert not get(machine).any()
    log.stop(0)


def test_the_way_can_change_when_no_slot_is_logged(machine):
    log = machine.log
    log.start(0, manual=True)
    with pytest.raises(UsageError, match="in the same way"):
        log.start(1, manual=False)
    log.stop(0)
    log.stop(0)
    assert not log.logging
    log.start(0, manual=False)
    wait_heartbeats(machine)
    machine.pause()
    get(machine)
    assert not get(machine).any()


def test_logging_is_off_unless_started(machine):
    assert not machine.log.logging
    with pytest.raises(Exception, match="KVM_GET_DIRTY_LOG"):
        get(machine)


def test_a_kernel_without_manual_clearing_says_so(machine, monkeypatch):
    from amig.dirty.log import LogAbilities

    monkeypatch.setattr(machine.log, "abilities", LogAbilities(manual_clear=False, initially_set=False))
    with pytest.raises(KvmUnavailable, match="auto-clear"):
        machine.log.start(0, manual=True)
    assert not machine.log.logging


def test_stopping_after_the_machine_has_closed_is_harmless(machine):
    machine.log.start(0, manual=True)
    machine.close()
    machine.log.stop(0)
