"""``python -m amig`` is the command ``amig``."""

from amig.cli import main

main()
