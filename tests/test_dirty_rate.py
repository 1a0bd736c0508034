"""``amig dirty-rate``: what it prints, for people and for programs."""

from __future__ import annotations

import asyncio
import json

import pytest

from amig.cli.dirty_rate import _measure, _range
from amig.errors import NoSuchGuest, UsageError
from tests.moving import (
    homes,  # noqa: F401 - a fixture
    hosting,
)

pytestmark = pytest.mark.usefixtures("homes")
ENGINES = [pytest.param("kvm", marks=pytest.mark.kvm), "simulator"]


@pytest.mark.parametrize("engine", ENGINES)
async def test_for_people(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with hosting("workload=sequential ws=8M rate=100M", engine=engine) as source:
        await _measure(source.name, 0.1, 3, None, json=False)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:3]] == ["1/3", "2/3", "3/3"]
    assert out[3].startswith("dirty rate ")
    assert out[4].startswith("working set ")
    (title,) = [line for line in out if line.startswith("heat map")]
    assert title.endswith("a cell")
    rows = out[out.index(title) + 1 :]
    assert rows
    assert all(row.endswith("|") for row in rows)
    assert any(shade in row for row in rows for shade in "░▒▓█"), "something is hot"


@pytest.mark.parametrize("engine", ENGINES)
async def test_for_programs(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with hosting("workload=sequential ws=8M rate=100M", engine=engine) as source:
        await _measure(source.name, 0.1, 2, (0, 32 << 20), json=True)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["sample", "sample", "summary"]
    assert all(event["pages_per_s"] > 0 for event in events)
    summary = events[-1]
    assert summary["memory_pages"] == 8192
    assert summary["working_set"][0]["pages"] <= summary["working_set"][1]["pages"]
    assert max(summary["heat"]) > 0


async def test_the_log_is_off_again_also_when_it_is_interrupted() -> None:
    async with hosting("workload=idle", engine="simulator") as source:
        measuring = asyncio.create_task(_measure(source.name, 3600, 1, None, json=True))
        while not source.hosted.hub.users:
            await asyncio.sleep(0.005)
        assert [user.exact for user in source.hosted.hub.users] == [False]
        measuring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await measuring
        assert source.hosted.hub.strategy is None


async def test_a_guest_that_is_not_there() -> None:
    with pytest.raises(NoSuchGuest):
        await _measure("nobody", 1, 1, None, json=False)


def test_a_range() -> None:
    assert _range("0xfd000000:16MiB") == (0xFD000000, 16 << 20)
    assert _range("4096:4096") == (4096, 4096)


@pytest.mark.parametrize("words", ["", "1", "x:1MiB", "-1:4096", ":4096", "0:", "0:many"])
def test_a_range_that_is_none(words: str) -> None:
    with pytest.raises(UsageError, match="--range"):
        _range(words)
