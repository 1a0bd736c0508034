"""The observer of one run, as the demo has it, but looking less often: it must not take a core from the migration."""

from __future__ import annotations

from amig.cli import demo_watch

PAUSE = 400e-6
"""Seconds between two looks: a twenty-fifth of the shortest downtime that is asked for."""


def main() -> None:
    """Run the observer."""
    demo_watch.PAUSE = PAUSE
    demo_watch.main()


if __name__ == "__main__":
    main()
