"""Where reports go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec


def write(directory: Path, name: str, page: str, value: Any) -> None:
    """Write ``name.md`` and ``name.json``, making the directory; an old report is replaced only by a whole one."""
    directory.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".md", page.encode()), (".json", msgspec.json.format(msgspec.json.encode(value)) + b"\n")):
        part = directory / f".{name}{suffix}.part"
        part.write_bytes(content)
        part.replace(directory / f"{name}{suffix}")
