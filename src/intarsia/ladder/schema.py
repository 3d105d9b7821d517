"""Frozen dataclasses from mappings, strictly: every key known, every value of the declared type.

A plan decides days of computing, so a mistyped key must not be ignored. Errors name the place in the plan
(`arms[1].preset`), what was found, and the key that was probably meant; where
the plan came from TOML text the line is given.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from intarsia.errors import OptionError, did_you_mean

T = TypeVar("T")


class PlanError(OptionError):
    """A plan that cannot be right. The message names the place, `path`, first."""

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(f"{path_name(path)}: {message}" if path else message, path)
        self.message = message

    def under(self, path: tuple[str | int, ...]) -> PlanError:
        """The same error of something that stands at `path` in a larger plan."""
        return PlanError(self.message, (*path, *self.path))


def path_name(path: tuple[str | int, ...]) -> str:
    """`("arms", 1, "preset")` as `arms[1].preset`."""
    name = ""
    for key in path:
        name += f"[{key}]" if isinstance(key, int) else f".{key}" if name else key
    return name


def build(cls: type[T], values: Any, path: tuple[str | int, ...] = ()) -> T:
    """Make the dataclass `cls` from a mapping, converting nested mappings and lists.

    Raises:
        PlanError: an unknown or missing key, or a value of another type than declared.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise PlanError(f"expected a table of options, got {_shown(values)}", path)
    assert dataclasses.is_dataclass(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            raise PlanError(f"unknown option{did_you_mean(key, known)}", (*path, str(key)))
    required = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in values:
            raise PlanError(f"{name!r} is missing", path)
    made = {name: convert(value, hints[name], (*path, name)) for name, value in values.items()}
    try:
        return cls(**made)
    except PlanError as error:
        # The object's own check knows the field and not where the object stands in the plan.
        raise error.under(path) from None


def convert(value: Any, hint: Any, path: tuple[str | int, ...]) -> Any:
    """`value` as the type `hint`, or a PlanError. Whole numbers are accepted for floats, lists for tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        choices = [choice for choice in args if choice is not type(None)]
        if len(choices) == 1:
            return convert(value, choices[0], path)
        for choice in choices:
            try:
                return convert(value, choice, path)
            except PlanError:
                continue
        raise PlanError(f"expected {_named(hint)}, got {_shown(value)}", path)
    if origin is typing.Literal:
        if value not in args:
            raise PlanError(f"{value!r} is none of {', '.join(map(str, args))}", path)
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise PlanError(f"expected a list, got {_shown(value)}", path)
        return tuple(convert(item, args[0], (*path, index)) for index, item in enumerate(value))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise PlanError(f"expected a table, got {_shown(value)}", path)
        return dict(value)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise PlanError(f"expected {_named(hint)}, got {_shown(value)}", path)
    return value


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it; tables are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = (
            merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


#: TOML has no word for "no value"; in the tables of a plan that are options of something else, this is it.
NULL = "null"


def with_none(value: Any) -> Any:
    """`value` with None for every `"null"` in it."""
    return _replaced(value, NULL, None)


def without_none(value: Any) -> Any:
    """`value` with `"null"` for every None in it."""
    return _replaced(value, None, NULL)


def _replaced(value: Any, old: Any, new: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, old, new) for item in value]
    return new if value == old else value


def toml_line(text: str, path: tuple[str | int, ...]) -> int | None:
    """The line (from 1) of TOML `text` where `path` is set, or the nearest enclosing one; None if not found.

    A light scan of headers and keys, good enough to point a reader to the place. It ignores the
    inside of multi-line strings.
    """
    places: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    counts: dict[tuple[str | int, ...], int] = {}
    quoted: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if quoted:
            if quoted in line:
                quoted = None
            continue
        if header := re.match(r"\s*\[\[([^\]]+)\]\]", line):
            name: tuple[str | int, ...] = _keys(header[1])
            # Tables inside an element of an array, as [arms.model], belong to the newest element.
            name = _placed(name, counts)
            counts[name] = counts.get(name, -1) + 1
            table = (*name, counts[name])
            places.setdefault(name, number)
            places.setdefault(table, number)
        elif header := re.match(r"\s*\[([^\]]+)\]", line):
            table = _placed(_keys(header[1]), counts)
            places.setdefault(table, number)
        elif key := re.match(r"""\s*([\w.\-"']+)\s*=(.*)""", line):
            keys = _keys(key[1])
            for length in range(1, len(keys) + 1):
                places.setdefault((*table, *keys[:length]), number)
            for mark in ('"""', "'''"):
                if key[2].count(mark) == 1:
                    quoted = mark
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    return None


def _keys(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _placed(
    name: tuple[str | int, ...], counts: Mapping[tuple[str | int, ...], int]
) -> tuple[str | int, ...]:
    placed: tuple[str | int, ...] = ()
    for position, key in enumerate(name):
        placed = (*placed, key)
        if placed in counts and position < len(name) - 1:
            placed = (*placed, counts[placed])
    return placed


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _named(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    args = [choice for choice in typing.get_args(hint) if choice is not type(None)]
    return " or ".join(_named(choice) for choice in args) if args else getattr(hint, "__name__", str(hint))
