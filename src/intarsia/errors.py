"""The errors that Intarsia raises on purpose.

Each message says what was wrong and what to do about it. The command line prints the message without a
traceback; anything that is not an `IntarsiaError` is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Self


class IntarsiaError(Exception):
    """The base of every error raised on purpose."""


class ConfigError(IntarsiaError, ValueError):
    """A configuration, a plan or an option that cannot be right."""


class OptionError(ConfigError):
    """An option that cannot be right.

    Attributes:
        message: what is wrong. One that begins with "must" or "is" goes on from the option's name.
        path: where the option stands, as keys and indices, as far as is known to whom raised it:
            `("mixers", "kda", "num_heads")`.
        place: where it was written down, as far as that is known: `plan.toml:12`.
    """

    def __init__(self, message: str, path: tuple[str | int, ...] = (), place: str = "") -> None:
        super().__init__(message, path, place)
        self.message = message
        self.path = path
        self.place = place

    def under(self, path: tuple[str | int, ...]) -> Self:
        """The same error of something that stands at `path` in a larger whole."""
        return type(self)(self.message, (*path, *self.path), self.place)

    def at(self, place: str) -> Self:
        """The same error with the place where the option was written down."""
        return type(self)(self.message, self.path, place)

    def __str__(self) -> str:
        name = path_name(self.path)
        between = "" if not name else " " if self.message.startswith(("must ", "is ")) else ": "
        return f"{self.place}{': ' if self.place else ''}{name}{between}{self.message}"


def path_name(path: tuple[str | int, ...]) -> str:
    """`("arms", 1, "preset")` as `arms[1].preset`."""
    name = ""
    for key in path:
        name += f"[{key}]" if isinstance(key, int) else f".{key}" if name else key
    return name


class ShapeError(IntarsiaError, ValueError):
    """Tensors whose shapes or dtypes do not fit together."""


class UnsupportedError(IntarsiaError, NotImplementedError):
    """A call that is well-formed but that the requested implementation cannot serve."""


class PoolError(IntarsiaError, RuntimeError):
    """A pool that has no room for what is to be put into it, or that has let go of what is asked for."""


class DataError(IntarsiaError, ValueError):
    """A corpus, a tokenizer or a prepared dataset that cannot be used."""


class CheckpointError(IntarsiaError, RuntimeError):
    """A checkpoint that is missing, damaged or of another model."""


class TrainingError(IntarsiaError, RuntimeError):
    """A training run that cannot go on."""


class MissingExtraError(IntarsiaError, ImportError):
    """An optional library that is not installed."""


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The name that is meant by one that is not there, if one is like it."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about a name that is not there: `; did you mean 'x'?` with the nearest that is, or all of
    them if none is near."""
    known = list(known)
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else f"; there are: {', '.join(known)}"
