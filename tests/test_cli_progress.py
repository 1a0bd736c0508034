"""How a migration shows while it runs."""

from __future__ import annotations

import io

import pytest

from amig.cli import progress as module
from amig.cli.progress import Bar, Lines, Nothing, display, figures, round_text
from amig.events import Event, Notice, Progress, RoundEnded, State, StateChanged

MIB_PAGES = 256
ROUND = RoundEnded(round=2, pages=100 * MIB_PAGES, remaining=3 * MIB_PAGES, seconds=0.5, bytes_per_s=2e8)
PROGRESS = Progress(
    state=State.MEMORY,
    round=2,
    fraction=0.625,
    remaining_pages=10 * MIB_PAGES,
    bytes_sent=5,
    bytes_per_s=1.25e9,
    dirty_bytes_per_s=3e8,
    eta_s=4.25,
    waiting_for="the guest [to] write less",
)
EVENTS: list[Event] = [
    StateChanged(state=State.CONNECTING),
    StateChanged(state=State.CONNECTING),
    StateChanged(state=State.MEMORY),
    PROGRESS,
    ROUND,
    Notice(text="mind [the] gap"),
    StateChanged(state=State.SWITCHOVER),
    StateChanged(state=State.COMPLETED),
    StateChanged(state=State.FAILED, reason="told at the end"),
]


def test_figures_say_how_fast_what_is_left_and_what_it_waits_for() -> None:
    text = figures(PROGRESS)
    for part in (
        "round 2",
        "10 MiB left",
        "1.25 GB/s out",
        "300 MB/s written",
        "4.25 s to the switchover",
        "waits for",
    ):
        assert part in text
    for part in ("100 MiB in 500 ms", "200 MB/s", "3 MiB written meanwhile"):
        assert part in round_text(ROUND)


def test_lines_are_few(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Lines() as shown:
        for event in EVENTS:
            shown.show(event)
        for _ in range(100):
            shown.show(PROGRESS)
    said = capsys.readouterr()
    assert not said.out
    assert len(said.err.splitlines()) == 6, "a state once, a round, a notice; no progress within its period"
    monkeypatch.setattr(module, "_LINE_PERIOD", -1.0)
    shown.show(PROGRESS)
    assert "62%" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_and_keeps_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Tty()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = display("web1 to tcp://[::1]:7000")
    assert isinstance(shown, Bar)
    with shown:
        for event in EVENTS:
            shown.show(event)
        shown.show(PROGRESS)
    text = screen.getvalue()
    assert "web1 to tcp://[::1]:7000" in text
    assert "mind [the] gap" in text
    assert "round 2: 100 MiB" in text
    assert "62%" in text
    assert "the guest [to] write less" in text


def test_programs_see_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = display("title", quiet=True)
    assert isinstance(shown, Nothing)
    with shown:
        for event in EVENTS:
            shown.show(event)
    assert capsys.readouterr() == ("", "")
