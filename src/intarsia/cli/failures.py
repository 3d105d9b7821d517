"""How a verb fails: a message on stderr for what the user can mend, a traceback for a bug."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from intarsia.errors import IntarsiaError
from intarsia.files import message_of

P = ParamSpec("P")
R = TypeVar("R")

WRONG_INPUT = 2
INTERRUPTED = 130


def reported(verb: Callable[P, R]) -> Callable[P, R]:
    """The verb, with its expected errors turned into a message and an exit code.

    With the environment variable `INTARSIA_TRACEBACK=1` they keep their tracebacks.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader of a pipe has gone: typer ends quietly
        except (IntarsiaError, OSError) as error:
            if os.environ.get("INTARSIA_TRACEBACK"):
                raise
            print(f"intarsia: {message_of(error)}", file=sys.stderr)
            raise typer.Exit(WRONG_INPUT) from None

    return run
