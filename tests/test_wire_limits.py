"""docs/wire-protocol.md says what the code does."""

import re
from pathlib import Path

import pytest

from amig.stages import items
from amig.wire import limits, messages, states
from amig.wire.frametype import FrameType
from amig.wire.states import DestinationState, SourceState, Way

DOCS = Path(__file__).parent.parent / "docs" / "wire-protocol.md"
TEXT = DOCS.read_text(encoding="utf-8")


def section(title):
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_version_is_the_documented_one():
    assert TEXT.startswith(f"# The wire protocol, version {limits.VERSION}\n")


def test_the_table_of_limits_is_the_documented_one():
    documented = dict(re.findall(r"^\| `(MAX_\w+)` \| (\d+) \|", section("Limits"), re.MULTILINE))
    real = {name: str(value) for name, value in vars(limits).items() if name.startswith("MAX_")}
    del real["MAX_REGIONS"]
    assert documented == real


def test_the_frame_types_are_the_documented_ones():
    documented = dict(re.findall(r"^\| (\d+) \| (\w+) \|", section("Frames"), re.MULTILINE))
    assert documented == {str(int(t)): t.name for t in FrameType}


def test_the_fields_of_messages_are_the_documented_ones():
    table = section("Messages")
    for cls in messages.Message.__subclasses__():
        name = cls.__name__.upper()
        row = re.search(rf"^\| (?:PING, )?{name}(?:, PONG)? \| (.*) \|$", table, re.MULTILINE)
        assert row, name
        for field in cls.__struct_fields__:
            assert f"`{field}`" in row[1], f"{name} has a field {field}"


@pytest.mark.parametrize(
    ("title", "table", "lost", "first"),
    [
        ("Source", states.SOURCE, states.SOURCE_LOST, Way.SEND),
        ("Destination", states.DESTINATION, states.DESTINATION_LOST, Way.RECEIVE),
    ],
)
def test_the_tables_of_states_are_the_documented_ones(title, table, lost, first):
    rows = re.findall(
        r"^\| ([\w-]+) \| (.*?) ?\| (.*?) ?\| (.*?) ?\|$",
        section("States").partition(f"**{title}**")[2].partition("**D")[0].partition("\n- ")[0],
        re.MULTILINE,
    )
    kind = SourceState if title == "Source" else DestinationState
    documented = {state: cells for state, *cells in rows if state != "state"}
    assert list(documented) == [str(s) for s in list(kind)[:8]]
    for name, (one, two, gone) in documented.items():
        state = kind(name)
        said = {}
        for way, cell in ((first, one), (Way.SEND if first is Way.RECEIVE else Way.RECEIVE, two)):
            for part in filter(None, cell.split("; ")):
                frames, _, after = part.partition(" → ")
                for frame in frames.split(", "):
                    said[way, FrameType[frame]] = kind(after or name)
        real = {e: after for e, after in table[state].items() if e.type not in (FrameType.PING, FrameType.PONG)}
        assert said == real, name
        assert not gone or lost[state] == gone.strip("*"), name


def test_what_a_sender_makes_and_a_receiver_has_room_for_is_what_the_wire_allows():
    assert items.BLOCK_PAGES == limits.MAX_BLOCK_PAGES
    assert items.BLOCK_SPAN == limits.MAX_BLOCK_SPAN
