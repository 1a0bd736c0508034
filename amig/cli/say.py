"""How commands speak: results on standard output, everything else on standard error, JSON one object a line."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Any

import msgspec


def result(text: str) -> None:
    """What was asked for, on standard output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def to_whoever_listens(text: str) -> None:
    """As `result`, but a guest's host must not end because nobody reads what it says, or because a disk is full."""
    try:
        result(text)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


def note(text: str) -> None:
    """Anything else that a person should know, on standard error."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def warn(text: str) -> None:
    """Something that the operator should think about."""
    note(f"amig: warning: {text}")


def encode(value: Any) -> str:
    """Return one line of JSON."""
    return msgspec.json.encode(value).decode()


def json_line(value: Any) -> None:
    """One object on standard output."""
    result(encode(value))


class Speaker:
    """A command that answers people, or programs: ``--json``."""

    def __init__(self, *, json: bool) -> None:
        self.json = json

    def say(self, text: str, value: Any) -> None:
        """Say the same to either."""
        if self.json:
            json_line(value)
        else:
            result(text)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"amig: {record.levelname.lower()}: {record.getMessage()}"
            if record.exc_info:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            note(text)
        except Exception:
            self.handleError(record)


def set_up_logging(*, debug: bool) -> None:
    """Show what the library logs on standard error: warnings, or with ``debug`` everything."""
    root = logging.getLogger()
    root.handlers[:] = [_Handler()]
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
    if not debug:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
