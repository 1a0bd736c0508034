"""Threads that answer ask for short slices; what a thread does otherwise stays as it was."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from amig.promptness import SLICE_NS, be_patient, be_prompt

RELEASE = tuple(int(n) for n in platform.release().split("-")[0].split(".")[:2])


def in_a_thread(call: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def slice_ns() -> int | None:
    """What the kernel says of the calling thread; None where it does not tell."""
    path = Path(f"/proc/self/task/{threading.get_native_id()}/sched")
    if not path.exists():
        return None
    found = [line for line in path.read_text().splitlines() if line.startswith("se.slice")]
    return int(found[0].split(":")[1]) if found else None


def test_the_kernel_takes_it_without_privilege_and_niceness_stays() -> None:
    def call() -> object:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        return be_prompt(), be_patient(), os.getpriority(os.PRIO_PROCESS, 0) - before

    assert in_a_thread(call) == (True, True, 0)


@pytest.mark.skipif(RELEASE < (6, 12), reason="slices of single threads came with Linux 6.12")
def test_a_prompt_thread_has_a_short_slice_and_a_patient_one_the_usual() -> None:
    def call() -> object:
        be_patient()  # whoever started this thread may be prompt
        usual = slice_ns()
        be_prompt()
        short = slice_ns()
        be_patient()
        return usual, short, slice_ns()

    usual, short, after = in_a_thread(call)  # type: ignore[misc]
    if usual is None:
        pytest.skip("this kernel does not show slices")
    assert short == SLICE_NS < usual == after


def test_a_thread_with_a_policy_of_its_own_is_left_alone() -> None:
    def call() -> object:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return be_prompt(), os.sched_getscheduler(0)

    assert in_a_thread(call) == (False, os.SCHED_BATCH)
