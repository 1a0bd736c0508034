"""docs/dirty-log.md shows what the model says: its traces and tables are made here, and compared.

With AMIG_WRITE_DOCS=1 the page is written anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from amig.sim.proof.copies import CHUNKS, COUNTED, count
from amig.sim.proof.rules import BROKEN, DESIGNS, Broken, Rules
from amig.sim.proof.search import LOST, MARK, NEEDLESS, search
from amig.sim.proof.trace import draw, legend
from amig.sim.proof.verdicts import judge, refute, window_of

PAGE = Path(__file__).parent.parent / "docs" / "dirty-log.md"
BLOCK = re.compile(r"(<!-- model: ([a-z0-9-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
WRITING = bool(os.environ.get("AMIG_WRITE_DOCS"))
PLAIN = {"failures": False, "saving": False}


def fenced(lines: list[str]) -> str:
    return "```text\n" + "\n".join(lines) + "\n```\n"


def way(what: str, pages: int = 1, **rules: object) -> str:
    found = search(Rules(**(PLAIN | rules)), pages=pages, stop=frozenset({what}))  # type: ignore[arg-type]
    return fenced(draw(found, what))


def harm(broken: Broken) -> str:
    found = refute(broken)
    return fenced(draw(found.found, found.what))


def meaning() -> str:
    return legend(Rules(design="exact", users=3, external=True)) + "\n"


def table(design: str, pages: int) -> list[str]:
    rows = []
    for users in (1, 2):
        for external, failures in ((False, False), (True, True)):
            rules = Rules(design=design, users=users, external=external, failures=failures)
            row = judge(rules, pages, 1000, 20_000_000)
            words = " | ".join(row.word(what) for what in (LOST, NEEDLESS, MARK))
            rows.append(f"| {design} | {users} | {row.sources} | {words} | {window_of(design)} |")
    return rows


HEAD = """| design | users | sources | lost page | needless copy | lost mark | window |
|---|---|---|---|---|---|---|
"""


def verdict_table(pages: Callable[[str], int]) -> str:
    return HEAD + "".join(f"{row}\n" for design in DESIGNS for row in table(design, pages(design)))


def copies_table() -> str:
    text = "| design | display, another source | pages a chunk | needed | in the window | needless |\n"
    text += "|---|---|--:|--:|--:|--:|\n"
    for design in COUNTED:
        for disturbed in (False, True):
            for chunk in CHUNKS:
                run = count(design, chunk, disturbed=disturbed)
                numbers = " | ".join(f"{1000 * n / run.first:.0f}" for n in (run.needed, run.window, run.needless))
                text += f"| {design} | {'yes' if disturbed else 'no'} | {chunk} | {numbers} |\n"
    return text


def rules_table() -> str:
    text = "| broken rule | shown in | harm | steps |\n|---|---|---|--:|\n"
    for broken, design in BROKEN.items():
        found = refute(broken)
        text += f"| {broken} | {design} | {found.what} | {len(found.found.traces[found.what])} |\n"
    return text


BLOCKS: dict[str, Callable[[], str]] = {
    "legend": meaning,
    "blind": lambda: way(LOST, design="blind", pages=2),
    "migration-bitmap": lambda: way(LOST, design="migration-bitmap", users=2),
    "slot-cache-other": lambda: way(NEEDLESS, design="slot-cache", external=True),
    "slot-cache-display": lambda: way(NEEDLESS, design="slot-cache", users=2),
    "slot-cache-failure": lambda: way(NEEDLESS, design="slot-cache", failures=True),
    "slot-cache-start": lambda: way(NEEDLESS, design="slot-cache", initially_set=False),
    "no-compensation": lambda: harm(Broken.NO_COMPENSATION),
    "two-exact": lambda: harm(Broken.TWO_EXACT),
    "read-first": lambda: harm(Broken.READ_FIRST),
    "full-ring-forgets": lambda: harm(Broken.FULL_FORGETS),
    "rules": rules_table,
    "copies": copies_table,
    "table": lambda: verdict_table(lambda _: 2),
}


def shown() -> dict[str, str]:
    return {name: body for _, name, body, _ in BLOCK.findall(PAGE.read_text())}


@pytest.mark.skipif(not WRITING, reason="only with AMIG_WRITE_DOCS=1")
def test_write_the_page() -> None:
    text = BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]]() + found[4], PAGE.read_text())
    PAGE.write_text(text)


def test_every_block_of_the_page_is_made_here() -> None:
    assert set(shown()) == set(BLOCKS)


@pytest.mark.parametrize("name", sorted(set(BLOCKS) - {"table"}))
def test_the_page_shows_what_the_model_says(name: str) -> None:
    assert shown()[name] == BLOCKS[name]()


def test_the_table_of_the_page_is_that_of_the_model() -> None:
    """With one page, but for the design that needs two to go wrong; with two it takes a while (see below)."""
    assert shown()["table"] == verdict_table(lambda design: 2 if design == "blind" else 1)


@pytest.mark.soak
def test_the_whole_table_of_the_page_is_that_of_the_model() -> None:
    assert shown()["table"] == BLOCKS["table"]()


def test_traces_that_end_in_a_loss_or_a_needless_copy_say_so() -> None:
    for name in ("blind", "migration-bitmap"):
        assert "is not there as the source had left it" in shown()[name], name
    assert "will never hear of it" in shown()["no-compensation"]
    assert MARK in shown()["rules"]
