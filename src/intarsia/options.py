"""The values of options against the types that they are declared with.

Configurations come from files and command lines, where nothing checks a type: `num_heads = 2.5` and
`negative_eigenvalues = "no"` would be taken for what they are not, or end deep inside a layer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from intarsia.errors import OptionError, did_you_mean


def check_types(config: Any) -> None:
    """Make sure that every field of a dataclass holds what it is declared to hold.

    A whole number will do for a float, which must be finite, a list for a tuple, a table for a dataclass. Annotations
    that say more than a class, None, a union, a `Literal` or a sequence of these are not judged.

    Raises:
        OptionError: a value that is not of its field's type. `path` is the field's name.
    """
    hints = _hints(config.__class__)
    for field in dataclasses.fields(config):
        if field.init:
            check_type(field.name, getattr(config, field.name), hints[field.name])


def check_options(cls: type, values: Mapping[str, Any]) -> None:
    """The same for values that a dataclass is to be made of, before it is made. Names that it does not have are
    left to others."""
    hints = _hints(cls)
    for name, value in values.items():
        if name in hints:
            check_type(name, value, hints[name])


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise OptionError unless `value` is what `hint` declares."""
    if not _is(value, hint):
        near = ""
        choices = [choice for choice in _choices(hint) if isinstance(choice, str)]
        if isinstance(value, str) and choices:
            near = did_you_mean(value, choices) if len(choices) > 2 else ""
        raise OptionError(f"{name} must be {describe(hint)}; got {_shown(value)}{near}", (name,))


def describe(hint: Any) -> str:
    """What a type is called in a message: `a whole number or none`."""
    if hint is None or hint is type(None):
        return "none"
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if _is_union(origin):
        # None comes last, wherever the annotation has it.
        parts = [choice for choice in args if choice is not type(None)]
        return " or ".join(map(describe, [*parts, *(type(None) for _ in args[len(parts) :])]))
    if _is_sequence(origin):
        fixed = origin is tuple and args and args[-1] is not Ellipsis
        return f"a list of {len(args)}" if fixed else "a list"
    if dataclasses.is_dataclass(hint):
        return "a table"
    return getattr(hint, "__name__", str(hint))


@functools.cache
def _hints(cls: Any) -> Mapping[str, Any]:
    # A file that was run and not imported (runpy) is in no module by name: its functions know its names.
    names: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for value in vars(base).values():
            if isinstance(value, types.FunctionType) and value.__module__ == base.__module__:
                names |= value.__globals__
    return typing.get_type_hints(cls, localns=names)


def _is(value: Any, hint: Any) -> bool:
    if hint is None or hint is type(None):
        return value is None
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(origin):
        return any(_is(value, choice) for choice in args)
    if origin is typing.Literal:
        # True equals 1 and is another value.
        return any(value == choice and type(value) is type(choice) for choice in args)
    if _is_sequence(origin):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(_is, value, args))
        return not args or all(_is(item, args[0]) for item in value)
    if origin is not None:
        return not isinstance(origin, type) or isinstance(value, origin)
    if hint is Any or not isinstance(hint, type):
        return True
    if dataclasses.is_dataclass(hint):
        return isinstance(value, hint | Mapping)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _is_union(origin: Any) -> bool:
    return origin is typing.Union or origin is types.UnionType


def _is_sequence(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Sequence)


def _choices(hint: Any) -> tuple[Any, ...]:
    """All values that the `Literal`s in a type name."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return args
    return tuple(choice for arg in args for choice in _choices(arg))


def _shown(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if isinstance(value, str | bool | None) else f"{text} ({type(value).__name__})"
