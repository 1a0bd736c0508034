"""The command line; ``amig.cli:main`` is the program."""

import os

# numpy's linear algebra, which nothing here uses, would start threads that spin for a while.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from amig.cli.app import main

__all__ = ["main"]
