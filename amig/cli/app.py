"""The command ``amig``: its commands, and what an error looks like."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, TypeVar

import typer

from amig.cli import say
from amig.errors import AmigError

F = TypeVar("F", bound=Callable[..., None])

OVERVIEW = """Live migration of real KVM guests.

[bold]See it work[/bold]

\b
  amig demo

[bold]Move a guest between two hosts[/bold]

\b
  hosta$ amig run web1 --kernel vmlinuz --initrd initrd --memory 1400MiB --detach
  hostb$ amig receive --pair --name web1         # shows an address, good for one use
  hosta$ amig migrate web1 - --downtime 50ms     # asks for it; or, through ssh: amig migrate web1 ssh://hostb/web1

[bold]Exit codes[/bold]

0 done, 2 wrong usage, 10-19 KVM, 20-29 the guest, 30-39 its host, 40-49 the migration, 50 a snapshot, 130 cancelled.
"""

app = typer.Typer(
    name="amig",
    help=OVERVIEW,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

_MODULES = (
    "demo",
    "run",
    "receive",
    "migrate",
    "status",
    "console",
    "operate",
    "dirty_rate",
    "prove",
    "bench",
    "resolve",
)

EXAMPLES: dict[str, tuple[str, ...]] = {}
"""What the help of each command shows; comments apart, they are command lines that parse."""


GROUP_EXAMPLES: dict[str, tuple[str, ...]] = {}
"""The same of commands within a group."""


def command(*examples: str, name: str | None = None, group: typer.Typer | None = None) -> Callable[[F], F]:
    """Make a function a command, of ``group`` or at the top; its docstring, and the examples, are its help."""

    def register(function: F) -> F:
        called = name or function.__name__
        (EXAMPLES if group is None else GROUP_EXAMPLES)[called] = examples
        title = "Example" if len(examples) == 1 else "Examples"
        # Paragraphs in one line each, so that they wrap where the reader's terminal ends.
        paragraphs = (" ".join(part.split()) for part in (inspect.getdoc(function) or "").split("\n\n"))
        shown = "\n".join(f"  {example}" for example in examples)
        text = "\n\n".join(paragraphs) + f"\n\n[bold]{title}[/bold]\n\n\b\n{shown}"
        return (group or app).command(name=called, help=text)(function)

    return register


class Settings:
    """What holds for every command of this process."""

    debug = False
    arguments: Sequence[str] = ()


def _version(wanted: bool) -> None:
    if wanted:
        from amig.session.release import RELEASE

        say.result(f"amig {RELEASE}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="AMIG_DEBUG", help="Show the library's log, and errors with a traceback.")
    ] = False,
) -> None:
    Settings.debug = debug
    say.set_up_logging(debug=debug)
    if context.invoked_subcommand is None:
        say.result(context.get_help())


def load_commands(arguments: Sequence[str] = ()) -> None:
    """Make all commands known to `app`; only the one, where ``arguments`` begin with its name and it has a module."""
    first = arguments[0] if arguments else ""
    for name in [first] if first in _MODULES else _MODULES:
        import_module(f"amig.cli.{name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of what happened."""
    Settings.debug = False
    Settings.arguments = sys.argv[1:] if arguments is None else arguments
    try:
        load_commands(Settings.arguments)
        app(args=list(Settings.arguments), prog_name="amig")
    except AmigError as error:
        _fail(error, str(error) or type(error).__name__, error.exit_code)
    except KeyboardInterrupt as error:
        _fail(error, "interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads: there is nothing to be flushed at the end
        sys.exit(1)
    except Exception as error:
        text = f"this is a fault of amig, please report it with the output of amig --debug: {error!r}"
        _fail(error, text, 1)


def _fail(error: BaseException, text: str, code: int) -> None:
    if Settings.debug:
        import traceback

        traceback.print_exception(error)
    say.note(f"amig: {text}")
    sys.exit(code)
