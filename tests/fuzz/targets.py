"""The targets by name, each loaded only when it is asked for: the fuzzer does not watch what was imported before."""

from __future__ import annotations

from importlib import import_module

from .target import Target

NAMES = ("frames", "receiver", "snapshot", "kernel", "control", "records", "addresses", "states", "vhost")


def target(name: str) -> Target:
    """Return the target of that name."""
    found: Target = import_module(f"{__package__}.{name}").TARGET
    return found
