"""Where reports go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from amig.errors import UsageError

END = "<!-- measured: end -->"


def insert(page: Path, name: str, text: str) -> None:
    """Put ``text`` in place of what stands between the marks for ``name`` in a Markdown page. Raises `UsageError`.

    The marks are the lines ``<!-- measured: NAME -->`` and ``<!-- measured: end -->``.
    """
    begin = f"<!-- measured: {name} -->\n"
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise UsageError(f"{page} has no line {begin.strip()} with {END} after it: there is no place for the tables")
    part = page.with_name(f".{page.name}.part")
    part.write_text(f"{before}{begin}{text}{END}{after}")
    part.replace(page)


def write(directory: Path, name: str, page: str, value: Any) -> None:
    """Write ``name.md`` and ``name.json``, making the directory; an old report is replaced only by a whole one."""
    directory.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".md", page.encode()), (".json", msgspec.json.format(msgspec.json.encode(value)) + b"\n")):
        part = directory / f".{name}{suffix}.part"
        part.write_bytes(content)
        part.replace(directory / f"{name}{suffix}")
