"""The command `intarsia`: a verb per job, each in a file of its own.

Importing this package imports neither torch nor any other part of Intarsia: a verb imports what it needs when
it runs, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from intarsia import __version__
from intarsia.cli import (
    chat,
    compare,
    convert,
    exam,
    generate,
    inspect,
    ladder,
    mixers,
    presets,
    serve,
    sparsify,
    train,
)
from intarsia.cli.failures import reported
from intarsia.cli.threads import wait_briefly

app = typer.Typer(
    name="intarsia",
    no_args_is_help=True,
    add_completion=False,
    # A bug keeps Python's own traceback, whole and without colours, to be copied into a report.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

VERBS = {
    "train": train,
    "sparsify": sparsify,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "compare": compare,
    "ladder": ladder,
    "exam": exam,
    "inspect": inspect,
    "convert": convert,
    "presets": presets,
    "mixers": mixers,
}
"""A file each, whose function `command` is what the verb does."""

for name, verb in VERBS.items():
    app.command(name)(reported(verb.command))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"intarsia {__version__}")
        raise typer.Exit


@app.callback()
def _intarsia(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Build, judge and run hybrid linear-attention language models.

    \b
    Start here:
      intarsia presets                              the models there are, from nano to the published ones
      intarsia inspect kimi-linear-tiny             what one costs
      intarsia train kimi-linear-tiny               train it on the Python sources of this machine
      intarsia generate runs/kimi-linear-tiny "def "
      intarsia compare examples/demo.toml           which of several architectures is better?
      intarsia ladder examples/ladder.toml          and at which size, by which scaling law?

    Every verb explains itself: `intarsia train --help`.
    """
    if "torch" not in sys.modules:  # after that it is too late
        wait_briefly(os.environ)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 wrong input, 130 interrupted.

    `arguments` defaults to those of the process. Messages about wrong input go to stderr.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="intarsia")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
