"""Tasks as people write them: `relations:length=64,hops=1|2|3,distance=0|8` are six."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from itertools import product
from typing import Any, TypeVar

from intarsia.errors import ConfigError
from intarsia.tasks.registry import EXAMS

Made = TypeVar("Made")


def read_tasks(text: str, make: Callable[[str, Mapping[str, Any]], Made]) -> list[Made]:
    """The tasks of `NAME:option=value,option=value|value`: one for every choice of values, the last option fastest.

    Args:
        make: of a name and options.

    Raises:
        ConfigError: it is not of that form, or a task cannot be made.
    """
    name, _, given = text.partition(":")
    options: dict[str, list[Any]] = {}
    for part in given.split(",") if given else ():
        option, equals, values = part.partition("=")
        if not equals or not option or not all(values.split("|")):
            raise ConfigError(
                f"--tasks takes NAME:option=value,option=value (and value|value for several); got {text!r}"
            )
        options[option] = [_value(value) for value in values.split("|")]
    made = []
    for choice in product(*options.values()):
        try:
            made.append(make(name, dict(zip(options, choice, strict=True))))
        except ConfigError as error:
            raise ConfigError(f"--tasks {text}: {error}") from None
    return made


def how_to_write(kind: type[Any]) -> str:
    """A task's name with the options that it needs, and those that it may have."""
    found = [f for f in fields(kind) if f.init]
    needed = [f.name for f in found if f.default is MISSING and f.default_factory is MISSING]
    others = [f.name for f in found if f.name not in needed]
    written = kind.type + (":" + ",".join(f"{option}=…" for option in needed) if needed else "")
    return f"write {written}" + (f" (and, if you like, {', '.join(others)})" if others else "")


def options_of(task: Any) -> dict[str, Any]:
    """The options that say which task it is, without those that were left open."""
    return {name: value for name, value in asdict(task).items() if value is not None}


def written(name: str, options: Mapping[str, Any], always: Sequence[str] = ()) -> str:
    """A task as `read_tasks` reads it, without options that are as they are by default, but with those named."""
    kind = next(kind for kind in EXAMS if kind.type == name)
    usual = {field.name: field.default for field in fields(kind)}
    said = [
        f"{option}={value}" for option, value in options.items() if usual[option] != value or option in always
    ]
    return f"{name}:{','.join(said)}"


def _value(text: str) -> Any:
    """A number, true, false, none, or text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
