"""The command line; ``amig.cli:main`` is the program."""

from amig.cli.app import main

__all__ = ["main"]
