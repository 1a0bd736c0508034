"""Runs a command's coroutine: on uvloop, with signals as calls."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from amig.promptness import be_prompt

T = TypeVar("T")

SWITCH_INTERVAL = 0.0005
"""Seconds that a thread which comes back from the kernel waits for the interpreter, instead of 5 ms."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end on a loop of uvloop; a Ctrl-C that ``main`` does not handle cancels it."""
    import uvloop

    be_prompt()
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.freeze()  # what has been imported stays: a collection in the middle of a switchover need not look at it
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@contextmanager
def on_signals(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``handle`` on the event loop for SIGINT, SIGTERM and SIGHUP as long as the block lasts."""
    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
        numbers.remove(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])
