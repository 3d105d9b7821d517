"""The errors that Intarsia raises on purpose.

Each message says what was wrong and what to do about it. The command line prints the message without a
traceback; anything that is not an `IntarsiaError` is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IntarsiaError(Exception):
    """The base of every error raised on purpose."""


class ConfigError(IntarsiaError, ValueError):
    """A configuration, a plan or an option that cannot be right."""


class OptionError(ConfigError):
    """An option that cannot be right. `path` says where it stands, as keys and indices, as far as is known to whom
    raised it: `("mixers", "kda", "num_heads")`."""

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.path = path

    def under(self, path: tuple[str | int, ...]) -> OptionError:
        """The same error of something that stands at `path` in a larger whole."""
        return OptionError(self.message, (*path, *self.path))


class ShapeError(IntarsiaError, ValueError):
    """Tensors whose shapes or dtypes do not fit together."""


class UnsupportedError(IntarsiaError, NotImplementedError):
    """A call that is well-formed but that the requested implementation cannot serve."""


class DataError(IntarsiaError, ValueError):
    """A corpus, a tokenizer or a prepared dataset that cannot be used."""


class CheckpointError(IntarsiaError, RuntimeError):
    """A checkpoint that is missing, damaged or of another model."""


class TrainingError(IntarsiaError, RuntimeError):
    """A training run that cannot go on."""


class MissingExtraError(IntarsiaError, ImportError):
    """An optional library that is not installed."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about a name that is not there: `; did you mean 'x'?` with the nearest that is, or all of
    them if none is near."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"
