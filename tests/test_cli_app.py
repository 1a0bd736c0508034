"""The command line itself: help that teaches, errors in one line, exit codes that are kept."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import amig as package
from amig import errors
from amig.cli import app as module
from amig.cli.app import EXAMPLES, app
from tests.commands import amig, homes, ok

__all__ = ["homes"]

module.load_commands()
COMMANDS = {command.name or "" for command in app.registered_commands}


def test_alone_it_shows_what_there_is() -> None:
    text = ok().out
    assert "amig demo" in text
    for name in COMMANDS:
        assert f" {name} " in text


def test_it_knows_its_release() -> None:
    assert ok("--version").out == f"amig {package.__version__}\n"


def test_all_commands_have_examples() -> None:
    assert {"demo", "run", "receive", "migrate", "status", "list", "console", "stop", "resolve"} <= COMMANDS
    assert set(EXAMPLES) == COMMANDS
    assert all(EXAMPLES.values())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_example_is_a_command_line_that_parses(name: str) -> None:
    ok("--help")
    group = typer.main.get_command(app)
    context = typer.Context(group)
    command = group.get_command(context, name)  # type: ignore[attr-defined]
    for example in EXAMPLES[name]:
        words = shlex.split(example, comments=True)
        if "<" in words:
            words = words[: words.index("<")]
        assert words[:2] == ["amig", name], "an example shows its own command"
        command.make_context(name, words[2:], parent=context)  # type: ignore[union-attr]
    shown = " ".join(ok(name, "--help").out.replace("│", " ").split())
    assert " ".join(EXAMPLES[name][0].split()) in shown


def test_an_unknown_word_is_wrong_usage() -> None:
    assert amig("migrat").code == 2
    assert amig("status").code == 2
    assert amig("run", "x", "--vcpus", "many").code == 2


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("run", "x"), "--kernel IMAGE"),
        (("run", "x", "--workload", "check", "--kernel", "k"), "--kernel IMAGE"),
        (("run", "x", "--workload", "dance"), "sequential"),
        (("run", "x", "--workload", "check", "--memory", "512 potatoes"), "--memory: "),
        (("run", "x", "--workload", "check", "--rate", "200Mb/s"), "--rate: "),
        (("run", "x", "--kernel", "k", "--rate", "1MB/s"), "belong to --workload"),
        (("run", "x", "--kernel", "k", "--engine", "simulator"), "--workload"),
        (("run", "x", "--workload", "check", "--serial", "tty"), "file:PATH, stdio or none"),
        (("run", "x", "--workload", "check", "--serial", "stdio", "--detach"), "amig console"),
        (("run", "x", "--restore", "tcp://h:1"), "file:PATH"),
        (("run", "x", "--restore", "file:/nowhere", "--append", "a"), "--append"),
        (("run", "no/name", "--workload", "idle", "--engine", "simulator"), "no name for a guest"),
        (("migrate", "x", "nowhere"), "tcp://HOST:PORT"),
        (("migrate", "x", "tcp://127.0.0.1:1", "--downtime", "10"), "--downtime: "),
        (("migrate", "x", "tcp://127.0.0.1:1", "--streams", "0"), "streams"),
        (("migrate", "x", "tcp://127.0.0.1:1", "--log", "/nowhere/at/all"), "--log /nowhere/at/all: "),
        (("receive", "file:/x", "--name", "x"), "is a file"),
        (("resolve", "x", "--run-here", "--discard"), "--run-here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
@pytest.mark.usefixtures("homes")
def test_nonsense_is_refused_in_one_line_that_says_what_to_write(words: tuple[str, ...], part: str) -> None:
    said = amig(*words)
    assert said.code == 2
    line = said.err.splitlines()[-1]
    assert line.startswith("amig: ")
    assert part in line
    assert "Traceback" not in said.err
    assert not said.out


@pytest.mark.usefixtures("homes")
def test_a_guest_that_is_not_there_has_its_own_exit_code() -> None:
    for words in (("status", "web1"), ("stop", "web1"), ("console", "web1"), ("migrate", "web1", "tcp://127.0.0.1:1")):
        said = amig(*words)
        assert said.code == errors.NoSuchGuest.exit_code
        assert "no guest named web1 is hosted here" in said.err


@pytest.mark.usefixtures("homes")
def test_debug_shows_where_an_error_comes_from() -> None:
    assert "Traceback" not in amig("status", "web1").err
    assert "Traceback" in amig("--debug", "status", "web1").err


def test_a_fault_of_ours_is_owned_up_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(module, "app", broken)
    said = amig("status", "web1")
    assert said.code == 1
    assert "fault of amig" in said.err
    assert "oops" in said.err
    assert "Traceback" not in said.err


def test_exit_codes_are_told_and_documented() -> None:
    """They are part of the interface: those of the code, of docs/exit-codes.md and of the overview are the same."""
    classes = {cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.AmigError)}
    page = (Path(__file__).parent.parent / "docs" / "exit-codes.md").read_text()
    for cls in classes:
        assert f"| {cls.exit_code} | `{cls.__name__}` |" in page, cls
    known = {0, 1, 2, 130} | {cls.exit_code for cls in classes}
    told = {int(line.split("|")[1]) for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()}
    assert known <= told


README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_readme_has_the_two_commands_and_no_others_than_there_are() -> None:
    for line in (
        "python3 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/amig demo",
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/pytest",
    ):
        assert line in README
    assert set(re.findall(r"(?:`|\$ )amig ([a-z-]+)", README)) <= COMMANDS
    for link in re.findall(r"\]\(([^):]+)\)", README):
        assert (Path(__file__).parent.parent / link).exists(), link


# --- the package ---------------------------------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="nonsense"):
        package.nonsense  # noqa: B018


def test_what_type_checkers_see_is_what_is_loaded() -> None:
    tree = ast.parse(inspect.getsource(package))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == package._HOMES
    assert set(seen) | {"__version__"} == set(package.__all__)


def test_help_does_not_load_what_it_does_not_need() -> None:
    code = "import sys, amig.cli.app as a\ntry: a.main(['--help'])\nexcept SystemExit: pass\nprint(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("numpy", "zstandard", "uvloop", "amig.session.migration"):
        assert heavy not in loaded
