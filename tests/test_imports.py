"""Which room may import which: the layout shows the data's way, and this keeps it true."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "amig"

CORE = {
    "aio",
    "bitmap",
    "digest",
    "errors",
    "events",
    "fluid",
    "guest",
    "memory",
    "pieces",
    "policy",
    "stats",
    "units",
}
"""Modules at the top: no I/O, time passed in as a number (``aio`` waits, and does nothing else); of others' they import
numpy, msgspec and xxhash only."""

ALLOWED: dict[str, set[str]] = {
    "children": {"errors"},
    "promptness": set(),
    "kvm": {"errors"},
    "dirty": CORE | {"kvm"},
    "stages": CORE | {"promptness"},
    "wire": CORE,
    "transport": CORE | {"wire"},
    "sim": CORE | {"dirty", "host"},
    "control": CORE | {"dirty", "promptness"},
    "host": CORE | {"kvm", "dirty", "control", "promptness"},
    "session": CORE | {"stages", "wire", "transport", "control", "host", "sim"},
}
"""Rooms may import what stands here, and themselves; ``bench``, ``cli``, ``report`` and the top everything."""

THIRD_PARTY_OF_CORE = {"numpy", "msgspec", "xxhash"}
FREE = {"bench", "cli", "report", "__init__", "__main__"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) of every import, those for type checking included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "amig":
                for alias in node.names:
                    yield node.lineno, f"amig.{alias.name}"
            else:
                yield node.lineno, node.module


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def trespasses() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        here = room(path)
        if here in FREE:
            continue
        for line, module in imports(path):
            first, _, rest = module.partition(".")
            there = rest.partition(".")[0]
            where = f"{path.relative_to(PACKAGE.parent)}:{line} imports {module}"
            if first == "amig":
                if there != here and there not in ALLOWED.get(here, CORE):
                    yield where
            elif here in CORE and first not in THIRD_PARTY_OF_CORE and first not in STANDARD:
                yield where


STANDARD = set(__import__("sys").stdlib_module_names)


def test_every_room_imports_only_what_the_table_allows() -> None:
    assert list(trespasses()) == []


def test_every_file_lies_in_a_room_of_the_table() -> None:
    rooms = {room(p) for p in PACKAGE.rglob("*.py")}
    assert rooms <= CORE | set(ALLOWED) | FREE


def test_ioctl_is_called_in_one_place() -> None:
    callers = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "ioctl" and isinstance(node.ctx, ast.Load)
    ]
    assert set(callers) <= {"kvm/ioctl.py", "transport/sock.py"}


@pytest.mark.parametrize("module", sorted(CORE - {"aio"}))
def test_the_core_does_no_input_or_output(module: str) -> None:
    banned = {"asyncio", "os", "socket", "subprocess", "threading"}
    assert not {m.partition(".")[0] for _, m in imports(PACKAGE / f"{module}.py")} & banned
