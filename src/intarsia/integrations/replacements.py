"""Functions of other libraries that are replaced in this process, until it is undone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any


class Acceleration:
    """What one call of `accelerate_transformers` or `accelerate_fla` did: a context manager that undoes it at its end.

    `patched` names the functions that are replaced, `"family.function"` of transformers, `"module.function"` of
    flash-linear-attention.
    """

    def __init__(self, replacements: Replacements) -> None:
        self.patched = replacements.take()
        self._taken: Replacements | None = replacements

    def undo(self) -> None:
        """Take this call back; a second time does nothing. The last call taken back restores the library."""
        taken, self._taken = self._taken, None
        if taken is not None:
            taken.release()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        if self._taken is None:
            return "Acceleration(undone)"
        families = sorted({name.partition(".")[0] for name in self.patched})
        return f"Acceleration({len(self.patched)} functions of {', '.join(families)})"


@dataclass(frozen=True)
class Replacement:
    """One function under one name, in the names of a module (`vars(module)`) or in another dictionary."""

    names: dict[str, Any]
    name: str
    original: Callable[..., Any]
    ours: Callable[..., Any]

    def put(self) -> None:
        """Let the name mean ours."""
        self.names[self.name] = self.ours

    def restore(self) -> None:
        """Let the name mean the original again, unless somebody replaced it after us: then theirs stays."""
        if self.names.get(self.name) is self.ours:
            self.names[self.name] = self.original


class Replacements:
    """What is replaced in one library, for all calls that were not undone.

    `find` says what there is to replace, by the names that `Acceleration.patched` shows, and changes nothing.
    """

    def __init__(self, find: Callable[[], Mapping[str, Replacement]]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._calls = 0
        self._made: Mapping[str, Replacement] = {}

    def take(self) -> tuple[str, ...]:
        """Replace the functions unless an earlier call has, and return their names."""
        with self._lock:
            if not self._calls:
                self._made = self._find()
                for replacement in self._made.values():
                    replacement.put()
            self._calls += 1
            return tuple(self._made)

    def release(self) -> None:
        """Take one call back, and with the last one the replacements."""
        with self._lock:
            self._calls -= 1
            if not self._calls:
                for replacement in self._made.values():
                    replacement.restore()
                self._made = {}
