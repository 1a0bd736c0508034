"""How a migration shows while it runs: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol

from amig.cli import say
from amig.events import Event, Notice, Progress, RoundEnded, State, StateChanged
from amig.memory import PAGE_SIZE
from amig.units import format_duration, format_rate, format_size

_LINE_PERIOD = 5.0
"""Seconds between lines of progress where there is no terminal."""

_STATES = {
    State.CONNECTING: "connecting",
    State.MEMORY: "sending memory while the guest runs",
    State.SWITCHOVER: "the guest is paused: last pages and device state",
    State.RECONNECTING: "the connection is lost; the guest runs on, and the destination is sought again",
    State.COMMITTING: "the destination has everything and may run the guest",
    State.COMPLETED: "done",
    State.CANCELLED: "cancelled",
}


class Display(Protocol):
    """Shows events; a context manager."""

    def __enter__(self) -> Display:
        """Start showing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""

    def show(self, event: Event) -> None:
        """Show one event."""


def display(title: str, *, quiet: bool = False) -> Display:
    """Return what suits standard error; ``quiet`` shows nothing."""
    if quiet:
        return Nothing()
    return Bar(title) if sys.stderr.isatty() else Lines()


class Nothing:
    """For programs, which read the events themselves."""

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, event: Event) -> None:
        """Show nothing."""


class Lines:
    """A line for what matters, now and then one for how far it has come."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._state: State | None = None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, event: Event) -> None:
        """Show one event."""
        match event:
            case StateChanged() if event.state in _STATES and event.state is not self._state:
                self._state = event.state
                say.note(state_text(event))
            case RoundEnded():
                say.note(round_text(event))
            case Notice():
                say.note(event.text)
            case Progress() if time.monotonic() - self._last > _LINE_PERIOD:
                self._last = time.monotonic()
                say.note(f"{event.fraction:4.0%}  {figures(event)}")
            case _:
                pass


class Bar:
    """A bar, a line of figures under it, and a line for every round above it; gone at the end, but for the rounds."""

    def __init__(self, title: str) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.text import Text

        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(None), TaskProgressColumn(), TimeElapsedColumn(),
            expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=1.0)
        self._figures = Text()
        self._console = Console(stderr=True)
        self._live = Live(Group(self._bar, self._figures), console=self._console, transient=True, refresh_per_second=8)

    def __enter__(self) -> Bar:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        """Show one event."""
        match event:
            case StateChanged() if event.state in _STATES:
                self._figures.plain = f"  {_STATES[event.state]}"
                if event.reason:
                    self._console.print(state_text(event), highlight=False, markup=False)
            case RoundEnded():
                self._console.print(round_text(event), highlight=False, markup=False)
            case Notice():
                self._console.print(event.text, highlight=False, markup=False)
            case Progress():
                self._bar.update(self._task, completed=event.fraction)
                self._figures.plain = f"  {figures(event)}"
            case _:
                pass


def state_text(event: StateChanged) -> str:
    """Return what to say of a state, with the reason where there is one."""
    return f"{_STATES[event.state]}: {event.reason}" if event.reason else _STATES[event.state]


def round_text(event: RoundEnded) -> str:
    """Return what to say of a round."""
    return (
        f"  round {event.round}: {format_size(event.pages * PAGE_SIZE)} in {format_duration(event.seconds)} at "
        f"{format_rate(event.bytes_per_s)}, {format_size(event.remaining * PAGE_SIZE)} written meanwhile"
    )


def figures(event: Progress) -> str:
    """Return how fast it goes, what is left, and what it waits for."""
    parts = [f"round {event.round}", f"{format_size(event.remaining_pages * PAGE_SIZE)} left of it"]
    parts.append(f"{format_rate(event.bytes_per_s)} out")
    if event.dirty_bytes_per_s:
        parts.append(f"{format_rate(event.dirty_bytes_per_s)} written by the guest")
    if event.eta_s:
        parts.append(f"about {format_duration(event.eta_s)} to the switchover")
    text = ", ".join(parts)
    return f"{text}; waits for {event.waiting_for}" if event.waiting_for else text
