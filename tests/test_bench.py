"""The benches for real, small: a run of the published scenario, and designs that lose pages or don't."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from amig.bench.losses import Losses, bench, plan
from amig.bench.one_loss import OWN_FIRST, OWN_PAGES, differing
from amig.bench.summary import Report
from amig.cli import app as module
from amig.cli.app import GROUP_EXAMPLES, app
from amig.memory import PAGE_SIZE, MemoryMap, Region, Slot

module.load_commands()
SMALL = ("--scale", "0.005", "--rate", "60MB/s", "--bandwidth", "400MB/s", "--downtime", "300ms", "--no-calibrate")


async def amig(*arguments: str, room: Path, interrupt: str = "") -> tuple[int, str, str]:
    """Run the command; with ``interrupt`` send it SIGINT as soon as it has said that."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "amig", "bench", *arguments, stdout=-1, stderr=-1, env=os.environ | {"TMPDIR": str(room)}
    )
    try:
        assert process.stderr is not None
        errors = b""
        while interrupt and interrupt.encode() not in errors:
            part = await process.stderr.read(4096)
            assert part, errors
            errors += part
        if interrupt:
            process.send_signal(signal.SIGINT)
        out, rest = await process.communicate()
        return process.returncode or 0, out.decode(), (errors + rest).decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
def room() -> Iterator[Path]:
    """A directory whose name is short: control sockets lie below it, and their paths have a limit."""
    with TemporaryDirectory(prefix="ab-") as path:
        yield Path(path)


def left_over(room: Path) -> list[str]:
    """Processes that work in a directory, and what lies in it."""
    found = [str(path) for path in room.iterdir()]
    for entry in Path("/proc").iterdir():
        try:
            if str(room).encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found


@pytest.mark.kvm
async def test_the_published_scenario_in_small(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, errors = await amig(
        "dirty-log", *SMALL, "--runs", "1", "--only", "exact", "--only", "auto-clear", "--only", "ring",
        "--timeout", "30s", "--out", str(out), room=room,
    )  # fmt: skip
    assert code == 0, errors
    report = msgspec.json.decode((out / "dirty-log.json").read_bytes(), type=Report)
    assert [row.variant for row in report.rows] == ["exact", "auto-clear", "ring"]
    assert text.strip() == (out / "dirty-log.md").read_text().strip()
    for run in report.runs:
        assert run.moved is not None
        assert run.moved.result.dirty_log == run.variant
        assert run.downtime_ms is not None
        assert run.moved.idle_rate > 0
        assert run.moved.log is not None
        assert run.moved.log.gets > 0
        # Nothing of the log is cleared by itself with auto-clear, and everything that was sent with exact.
        assert (run.moved.log.clears > 0) == (run.variant != "auto-clear")
    for row in report.rows:
        assert row.total_s is not None
        assert row.limit_s is not None
        assert row.total_s.median > row.limit_s.median, "nothing is quicker than the limit"
    assert left_over(room) == []


@pytest.mark.kvm
async def test_a_run_that_does_not_converge_is_told_as_such(room: Path) -> None:
    code, text, errors = await amig(
        "dirty-log", "--scale", "0.005", "--rate", "400MB/s", "--bandwidth", "50MB/s", "--no-calibrate", "--timeout",
        "3s", "--runs", "1", "--only", "slot-cache", room=room,
    )  # fmt: skip
    assert code == 1, errors
    assert "none of 1 runs" in text
    assert "- slot-cache: did not converge in" in text
    assert left_over(room) == []


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("words", "sign"),
    [
        (("dirty-log", *SMALL, "--runs", "50", "--only", "exact"), "/50"),
        (("losses", "--runs", "500", "--only", "blind", "--with", "alone"), "/500"),
    ],
    ids=["dirty-log", "losses"],
)
async def test_ctrl_c_ends_everything(room: Path, words: tuple[str, ...], sign: str) -> None:
    code, _, errors = await amig(*words, room=room, interrupt=sign)
    assert code == 130, errors
    assert "Traceback" not in errors
    assert left_over(room) == []


@pytest.mark.kvm
async def test_designs_that_lose_pages_do_and_the_others_do_not() -> None:
    """In the guest's own words; a design that only may lose gets a few tries."""
    told: list[str] = []
    cells = [
        *plan(["blind"], ["alone"]),
        *plan(["migration-bitmap"], ["users"]),
        *plan(["slot-cache"], ["all"])[:1],
        *plan(["exact"], ["all"])[:1],
        *plan(["ring"], ["all"]),
    ]
    found = await bench(cells, 2, told.append)
    by = {cell.design: cell for cell in found.cells}
    for name in ("slot-cache", "exact", "ring"):
        assert by[name].as_claimed, told
        assert by[name].errors == ()
        assert by[name].samples > 0
        assert by[name].looks > 0
        assert by[name].touched > 0
        assert by[name].copies.again > 0
    assert by["exact"].copies.needless == 0
    for name, company in (("blind", "alone"), ("migration-bitmap", "users")):
        for _ in range(5):
            if by[name].damaged:
                break
            again: Losses = await bench(plan([name], [company]), 3, told.append)
            by[name] = again.cells[0]
        assert by[name].as_claimed, told
        assert "MISMATCH" in by[name].words[0]


def test_a_lost_write_of_the_device_backend_is_seen() -> None:
    size = (OWN_FIRST + OWN_PAGES) * PAGE_SIZE
    map_ = MemoryMap(
        generation=1,
        regions=(Region(id=0, size=size),),
        slots=(Slot(index=0, guest_phys=0, size=size, region=0, offset=0),),
    )

    class Memory:
        words = np.zeros((OWN_FIRST + OWN_PAGES, 512), np.uint64)

        def pages(self, region: int) -> np.ndarray:
            return self.words.view(np.uint8)

    generations = [0] * OWN_PAGES
    assert differing(Memory(), map_, tuple(generations)) == 0
    generations[3] = 2
    assert differing(Memory(), map_, tuple(generations)) == 1
    Memory.words[OWN_FIRST + 3] = 2 << 32 | 3
    assert differing(Memory(), map_, tuple(generations)) == 0
    Memory.words[OWN_FIRST + 3, 511] = 1 << 32 | 3
    assert differing(Memory(), map_, tuple(generations)) == 1


def test_every_example_of_the_group_parses() -> None:
    group = typer.main.get_command(app)
    context = typer.Context(group)
    bench_group = group.get_command(context, "bench")  # type: ignore[attr-defined]
    assert set(GROUP_EXAMPLES) == {"dirty-log", "losses"}
    for name, examples in GROUP_EXAMPLES.items():
        command = bench_group.get_command(context, name)
        for example in examples:
            words = example.split()
            assert words[:3] == ["amig", "bench", name]
            command.make_context(name, words[3:], parent=context)


@pytest.mark.parametrize(
    "words",
    [
        ("dirty-log", "--scale", "0"),
        ("dirty-log", "--rate", "unlimited"),
        ("dirty-log", "--only", "D4"),
        ("losses", "--only", "D4"),
        ("losses", "--with", "friends"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told_before_anything_starts(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["bench", *words])
    assert type(result.exception).__name__ == "UsageError"
