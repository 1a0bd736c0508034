"""``amig dirty-rate``: how fast a guest dirties its memory, its working set, and where it is hot."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from amig.cli import options, say
from amig.cli.app import command
from amig.errors import UsageError
from amig.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from amig.dirty.meter import DirtyMeter, Sample

_SHADES = " ░▒▓█"
_COLORS = ("", "blue", "cyan", "yellow", "red")
_STEPS = (0.0, 0.02, 0.2, 0.6)
"""A cell has the shade whose step its heat exceeds: hardly, some, much, nearly all of its pages each time."""
_MAP_WIDTH, _MAP_ROWS = 64, 16
_PAGE = 4096


@command(
    "amig dirty-rate web1",
    "amig dirty-rate web1 --seconds 0.5 --samples 20",
    "amig dirty-rate web1 --range 0xfd000000:16MiB     # only this part, a framebuffer perhaps",
    "amig dirty-rate web1 --json",
    name="dirty-rate",
)
def dirty_rate(
    name: options.GuestName,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", help="How long a sample takes.")] = 1.0,
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="How many.")] = 5,
    range_: Annotated[
        str | None, typer.Option("--range", metavar="START:SIZE", help="Only this guest-physical memory.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure how fast a guest dirties its memory.

    Counts the pages that were written in each sample (a page written twice counts once), estimates the working set over
    growing windows, and draws where memory is hot. The guest's writes get a little slower meanwhile; a migration that
    runs loses nothing. Pages that are only possibly dirty, because a migration cleared them first, are counted apart.
    """
    from amig.cli.loop import run

    run(_measure(name, seconds, samples, _range(range_) if range_ else None, json=json))


def _range(words: str) -> tuple[int, int]:
    start, colon, size = words.partition(":")
    try:
        first = int(start, 0)
    except ValueError:
        first = -1
    if first < 0 or not colon:
        raise UsageError(f"--range {words}: write START:SIZE, as in 0xfd000000:16MiB")
    return first, options.size("--range", size)


async def _measure(name: str, seconds: float, count: int, part: tuple[int, int] | None, *, json: bool) -> None:
    from amig.dirty.meter import DirtyMeter, spans_of
    from amig.host.attach import open_guest

    guest = await open_guest(name, client="amig dirty-rate")
    try:
        spans = spans_of(guest.info.memory, *(part or (None, None)))
        async with DirtyMeter(guest, spans) as meter:
            async for sample in meter.samples(seconds, count):
                if json:
                    say.json_line(_as_json(sample))
                else:
                    say.result(_as_line(len(meter.samples_taken), count, sample))
    finally:
        await guest.close()
    if json:
        say.json_line(summary(meter))
    else:
        _show(meter)


def _as_json(sample: Sample) -> dict[str, object]:
    return {
        "event": "sample",
        "seconds": sample.seconds,
        "pages": sample.pages,
        "pages_per_s": sample.pages_per_s,
        "bytes_per_s": sample.pages_per_s * _PAGE,
        "possible_pages": sample.possible,
    }


def _as_line(number: int, count: int, sample: Sample) -> str:
    possible = f", {sample.possible} more pages possibly" if sample.possible else ""
    return (
        f"{number:>{len(str(count))}}/{count}  {sample.pages_per_s:>10.0f} pages/s  "
        f"{format_rate(sample.pages_per_s * _PAGE)}{possible}"
    )


def summary(meter: DirtyMeter) -> dict[str, object]:
    """Return what the whole measurement says, for programs."""
    total = sum(sample.seconds for sample in meter.samples_taken)
    pages = sum(sample.pages for sample in meter.samples_taken)
    return {
        "event": "summary",
        "seconds": total,
        "memory_pages": meter.pages,
        "pages_per_s": pages / total,
        "bytes_per_s": pages / total * _PAGE,
        "possible_pages": sum(sample.possible for sample in meter.samples_taken),
        "working_set": [{"seconds": w.seconds, "pages": w.pages} for w in meter.working_set()],
        "heat": [round(float(h), 4) for h in meter.heat(_MAP_WIDTH * _MAP_ROWS)],
    }


def _show(meter: DirtyMeter) -> None:
    from rich.console import Console
    from rich.text import Text

    rates = [sample.pages_per_s for sample in meter.samples_taken]
    total = sum(sample.seconds for sample in meter.samples_taken)
    mean = sum(sample.pages for sample in meter.samples_taken) / total
    extremes = f"{min(rates):.0f} to {max(rates):.0f} pages/s"
    say.result(f"dirty rate   {mean:.0f} pages/s, {format_rate(mean * _PAGE)} ({extremes})")
    for window in meter.working_set():
        share = window.pages / meter.pages
        say.result(
            f"working set  {format_size(window.pages * _PAGE)} in {format_duration(window.seconds)} ({share:.1%})"
        )
    cells = meter.heat(_MAP_WIDTH * _MAP_ROWS)
    cell = meter.pages * _PAGE / len(cells)
    console = Console(file=sys.stdout, highlight=False)
    say.result(f"heat map     {format_size(cell)} a cell")
    for start in range(0, len(cells), _MAP_WIDTH):
        row = Text(f"{format_size(start * cell):>11}  ")
        for heat in cells[start : start + _MAP_WIDTH]:
            shade = sum(heat > step for step in _STEPS)
            row.append(_SHADES[shade], style=_COLORS[shade])
        row.append("|")
        console.print(row, soft_wrap=True)


__all__ = ["dirty_rate", "summary"]
