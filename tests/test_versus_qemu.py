"""The bench beside QEMU: its arithmetic, its monitor client, and one small migration of each side."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from tests.bench import growth, qemu, versus_qemu
from tests.bench.measured import Run
from tests.bench.one_run import one_run
from tests.bench.qmp import Qmp, QmpError
from tests.bench.report import LEGEND, markdown
from tests.bench.scenarios import AMIG, BEST, FLUID, MULTIFD, PLAIN, SCENARIOS, XBZRLE, Mode, Scenario, Target, choose
from tests.bench.summary import Report, best, line_fit, ratios, report

MIB = 1 << 20
SMALL = Scenario(
    name="small",
    title="a small guest",
    memory=64 * MIB,
    words="workload=random ws=16MiB rate=20MB/s write=byte fill=random",
    link=200_000_000,
    downtime=0.3,
    streams=1,
    working_set=16 * MIB,
    modes=(AMIG, PLAIN),
    targets=(Target(ours=AMIG, theirs=BEST, at_most=0.5), Target(ours=AMIG, theirs=FLUID, at_most=1.2)),
)


# ---- from runs to a report ----


def run(mode: Mode, turn: int, total: float | None, **more: object) -> Run:
    known = {"scenario": "small", "preallocated": False, "start_s": 0.0} | more
    if total is None:
        known |= {"error": "it did not end in 60 s: after 9 rounds 70 pages were left"}
    return Run(mode=mode.name, side=mode.side, turn=turn, total_s=total, **known)  # type: ignore[arg-type]


SAME = {"progress": 0.9, "source_bytes": MIB, "destination_bytes": MIB}


def runs() -> list[Run]:
    return [
        run(AMIG, 0, 1.0, start_s=0.2, limit_s=0.8, downtime_ms=5.0, **SAME),
        run(PLAIN, 0, 4.0, downtime_ms=10.0, progress=0.8),
        run(MULTIFD, 0, 2.0, downtime_ms=10.0, progress=0.8),
        run(AMIG, 1, 3.0, start_s=0.2, limit_s=1.0, downtime_ms=20.0, **SAME),
        run(PLAIN, 1, 3.0, downtime_ms=10.0, progress=0.8),
        run(MULTIFD, 1, None),
        run(AMIG, 2, 0.1, error="the guest has moved, but was not seen to run over there"),
        run(PLAIN, 2, 3.0, downtime_ms=10.0, progress=0.8),
        run(MULTIFD, 2, 2.2, downtime_ms=10.0, progress=0.8),
    ]  # fmt: skip


def of(mode: Mode) -> list[Run]:
    return [one for one in runs() if one.mode == mode.name]


def test_ratios_are_taken_within_a_turn_and_of_runs_that_ended_well() -> None:
    found = ratios(of(AMIG), of(PLAIN), lambda one: one.total_s)
    assert found is not None
    assert (found.low, found.median, found.high) == (0.25, 0.625, 1.0)
    back = ratios(of(PLAIN), of(AMIG), lambda one: one.total_s)
    assert back is not None
    assert (back.low, back.high) == (1.0, 4.0)
    alone = ratios(of(AMIG), of(MULTIFD), lambda one: one.total_s)
    assert alone is not None
    assert (alone.low, alone.high) == (0.5, 0.5)
    assert ratios(of(AMIG), [], lambda one: one.total_s) is None


def test_the_best_is_the_qemu_mode_with_the_least_median() -> None:
    assert best(runs()) == MULTIFD.name
    assert best(of(AMIG)) is None
    assert best([run(PLAIN, 0, None)]) is None


def small_report() -> Report:
    scenario = replace(SMALL, modes=(AMIG, PLAIN, MULTIFD))
    return report(scenario, scenario.modes, runs(), {"machine": "a test", "command": "`x`"})


def test_targets_are_met_or_missed_by_the_median() -> None:
    found = {one.text: one for one in small_report().findings}
    first = found[f"small: total time of amig, by {BEST} ({MULTIFD.name})"]
    assert first.met is True
    assert first.loaded is not None
    assert first.loaded.median == pytest.approx(0.4)
    assert found["small: total time of amig, by the fluid limit"].met is False
    downtime = found["T7: downtime of amig, by the limit"]
    assert downtime.found is not None
    assert downtime.found.high == pytest.approx(20 / 300)
    assert found[f"T7: downtime of amig, by {MULTIFD.name}"].found is not None
    slower = found[f"T7: time that the guest needs for its work of amig, by {MULTIFD.name}"]
    assert slower.found is not None
    assert slower.found.median == pytest.approx(0.8 / 0.9)
    assert found["T8: memory of amig beside the guest's, by 64 MiB"].met is True


def test_a_delta_cache_is_no_memory_that_amig_may_not_have() -> None:
    delta = replace(AMIG, cache=1 << 30)
    found = report(replace(SMALL, modes=(delta,)), (delta,), runs(), {}).findings
    assert "T8: memory of amig beside the guest's, by 1088 MiB" in {one.text for one in found}


def test_losing_and_failing_rows_stay_in_the_table() -> None:
    text = markdown(small_report())
    assert "2.00 (1.00–3.00), 2 of 3 runs" in text
    assert "- QEMU multifd: 1 of 3 runs: it did not end in 60 s: after 9 rounds 70 pages were left" in text
    assert "**missed**" in text
    nothing = report(SMALL, SMALL.modes, [run(AMIG, 0, None), run(PLAIN, 0, 1.0)], {})
    assert "none of 1 runs" in markdown(nothing)
    assert "not measured" in markdown(nothing)
    assert msgspec.json.decode(msgspec.json.encode(small_report()), type=Report) == small_report()


def test_a_line_through_costs() -> None:
    a, b, off = line_fit([1, 2, 4, 8], [1.1, 2.1, 4.1, 8.1])
    assert a == pytest.approx(0.1)
    assert b == pytest.approx(1.0)
    assert off < 1e-9
    assert line_fit([1, 2, 4, 8], [1, 2, 4, 12])[2] > 0.1
    noisy = line_fit([1, 2, 4, 8], [1.4, 2.4, 4.4, 9.2])
    assert noisy[0] == pytest.approx(0.4, abs=0.1), "what the largest was late by is not taken from the fixed part"
    with pytest.raises(ValueError, match="fewer than three"):
        line_fit([1, 2], [1, 2])


def test_growth_is_told_for_each_kind_of_destination_apart() -> None:
    """Fresh memory costs so much that a line through both would be no line."""
    reports = []
    for gib in (1, 2, 4):
        one = replace(SMALL, memory=gib << 30, modes=(AMIG,))
        some = [run(AMIG, 0, gib * (1.0 if p else 3.0), preallocated=p) for p in (False, True)]
        reports.append(report(one, one.modes, some, {}))
    slopes = {one.preallocated: one.per_gib for one in growth.lines(reports) if one.what == "total time, s"}
    assert slopes == {False: pytest.approx(3.0), True: pytest.approx(1.0)}
    text = growth.markdown(growth.Growth(machine={}, lines=tuple(growth.lines(reports)), rounds=()))
    assert "as it arrives" in text
    assert "populated" in text


def test_the_bitmap_work_is_that_of_a_round() -> None:
    found = {one.dirty: one for one in growth.rounds(1 << 30, repeat=2)}
    pages = (1 << 30) // 4096
    assert found["nothing"].ranges == 0
    assert found["everything"].pages == pages
    assert found["everything"].ranges == 256, "chunks of 4 MiB"
    assert all(len(one.sync_ms) == len(one.scan_ms) == 2 for one in found.values())
    assert "| everything" in growth.markdown(growth.Growth(machine={}, lines=(), rounds=tuple(found.values())))


# ---- what is asked for ----


def test_scenarios_have_names_of_their_own_and_targets_that_can_be_measured() -> None:
    assert len({one.name for one in SCENARIOS}) == len(SCENARIOS)
    for one in SCENARIOS:
        names = {mode.name for mode in one.modes}
        assert one.modes[0].side == "amig"
        assert all(t.ours.name in names and t.theirs in names | {BEST, FLUID} for t in one.targets)
        assert one.working_set or FLUID not in {t.theirs for t in one.targets}
    assert [s.name for s in choose(["T1"])] == ["T1-random", "T1-mixed"]
    assert [s.name for s in choose(["T1-mixed", "T1"])] == ["T1-mixed", "T1-random"]
    assert choose(["all"]) == choose(["T7"]) == list(SCENARIOS)


def test_the_page_has_a_place_for_every_table() -> None:
    page = (Path(__file__).parent.parent / "docs/performance.md").read_text()
    assert all(page.count(f"<!-- measured: {name} -->") == 1 for name in (*(s.name for s in SCENARIOS), "T9"))
    assert " ".join(LEGEND.split()) in " ".join(page.split())


@pytest.mark.parametrize(
    "words",
    [("--scenario", "T"), ("--pairs", "0"), ("--also", "--delta"), ("--destination", "elsewhere")],
    ids=" ".join,
)
def test_wrong_usage_is_told_before_anything_starts(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        versus_qemu.main(words)
    assert ended.value.code == 2
    assert "usage: versus-qemu" in capsys.readouterr().err


def test_modes_can_be_chosen_and_added() -> None:
    (scenario,) = choose(["T3-zero"])
    asked = versus_qemu.parse(["--also", "amig delta=--delta 1GiB", "--mode", "amig", "--mode", "QEMU multifd"])
    modes = versus_qemu.modes_of(scenario, asked)
    assert [mode.name for mode in modes] == ["amig", "amig delta", "QEMU multifd"]
    assert modes[1].words == ("--delta", "1GiB")


def test_without_qemu_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert versus_qemu.main(["--scenario", "T2"]) == 2
    assert "apt-get install qemu-system-x86" in capsys.readouterr().err


def test_both_sides_are_asked_for_the_same() -> None:
    (scenario,) = choose(["T1-random"])
    asked = qemu.parameters(scenario, MULTIFD)
    assert asked["max_bandwidth"] == scenario.link
    assert asked["downtime_limit"] == 10
    assert asked["multifd_channels"] == scenario.streams
    assert qemu.parameters(scenario, XBZRLE)["xbzrle_cache_size"] == scenario.working_set
    (words,) = [
        w for w in qemu.arguments(scenario, monitor=Path("m"), preallocated=True, incoming=True) if "memfd" in w
    ]
    assert words.endswith("prealloc=on")
    assert "share=on" in words


# ---- the monitor ----


async def test_the_monitor_client_keeps_events_and_raises_errors(tmp_path: Path) -> None:
    hung_up = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def say(value: object) -> None:
            writer.write(json.dumps(value).encode() + b"\r\n")

        say({"QMP": {"version": {}}})
        while line := await reader.readline():
            asked = json.loads(line)
            if asked["execute"] == "migrate":
                assert asked["arguments"] == {"max-x": 1}
                say({"event": "MIGRATION", "data": {"status": "setup"}})
                say({"event": "MIGRATION", "data": {"status": "completed"}})
                say({"return": {"it": "goes"}})
            elif asked["execute"] == "qmp_capabilities":
                say({"return": {}})
            else:
                say({"error": {"class": "GenericError", "desc": "no such thing"}})
        writer.close()
        await writer.wait_closed()
        hung_up.set()

    path = str(tmp_path / "monitor")
    server = await asyncio.start_unix_server(serve, path)
    try:
        qmp = await Qmp.connect(path)
        assert await qmp.run("migrate", max_x=1) == {"it": "goes"}
        assert (await qmp.event("MIGRATION", status="completed"))["data"] == {"status": "completed"}
        assert qmp.events == []
        with pytest.raises(QmpError, match="fly: no such thing"):
            await qmp.run("fly")
        qmp.close()
        await hung_up.wait()
    finally:
        server.close()
        await server.wait_closed()


# ---- for real ----


@pytest.mark.kvm
@pytest.mark.skipif(shutil.which(qemu.PROGRAM) is None, reason=f"no {qemu.PROGRAM}")
@pytest.mark.parametrize("mode", [AMIG, MULTIFD], ids=lambda mode: mode.name)
async def test_one_guest_moves(mode: Mode) -> None:
    found = await one_run(SMALL, mode, 0, preallocated=False)
    assert found.error is None
    assert found.whole
    assert found.downtime_ms is not None
    assert 0 < found.downtime_ms < found.total_s * 1e3  # type: ignore[operator]
    assert found.idle_writes_per_s
    assert found.progress
    assert found.pages_sent >= 16 * MIB // 4096  # type: ignore[operator]
    assert found.bytes_wire >= 16 * MIB  # type: ignore[operator]
    assert found.cpu_source_s >= 0  # type: ignore[operator]
    assert found.cpu_destination_s > 0  # type: ignore[operator]
    assert found.source_bytes > MIB  # type: ignore[operator]
    assert (found.start_s > 0) == (mode is AMIG)  # type: ignore[operator]
    assert (found.limit_s is not None) == (mode is AMIG)


@pytest.mark.kvm
@pytest.mark.skipif(shutil.which(qemu.PROGRAM) is None, reason=f"no {qemu.PROGRAM}")
async def test_a_run_that_does_not_end_is_told_as_such() -> None:
    slow = replace(SMALL, words=SMALL.words.replace("20MB/s", "200MB/s"), link=1_000_000, limit=1.0)
    found = await one_run(slow, PLAIN, 0, preallocated=False)
    assert not found.whole
    assert "did not end in 1 s: after" in (found.error or "")
