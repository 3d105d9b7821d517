"""Frozen dataclasses from mappings, strictly: every name known, every value of the declared type."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from intarsia.errors import ConfigError, OptionError, did_you_mean

T = TypeVar("T")
Path = tuple[str | int, ...]
Readers = Mapping[type, Callable[[Any], Any]]
"""How the options of a class are read whose fields do not say it all, such as one of several classes by a name."""


def read(cls: type[T], values: Any, readers: Readers | None = None) -> T:
    """Make the dataclass `cls` from a mapping, with all dataclasses within it.

    A whole number will do for a float, which must be finite, a list for a tuple, a table for a dataclass. Annotations
    that say more than a class, None, a union, a `Literal`, a mapping or a sequence of these are not judged.

    Args:
        readers: for the classes named there, instead of this function.

    Raises:
        OptionError: an unknown or missing name, a value of another type than declared, or what the class itself finds
            wrong. Its `path` says where.
    """
    return _read(cls, values, (), readers or {})


def settle_types(config: Any, readers: Readers | None = None) -> None:
    """The same for the fields of a dataclass that is being made (in `__post_init__`): each holds what it is declared
    to hold afterwards.

    Raises:
        OptionError: a value that is not of its field's type.
    """
    hints = _hints(config.__class__)
    for field in dataclasses.fields(config):
        if field.init:
            value = getattr(config, field.name)
            settled = convert(value, hints[field.name], (field.name,), readers)
            if settled is not value:
                object.__setattr__(config, field.name, settled)


def check_names(cls: type, names: Iterable[Any]) -> None:
    """Raise OptionError for the first name that is no option of a dataclass."""
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for name in names:
        if name not in known:
            raise OptionError(f"unknown option{did_you_mean(name, known)}", (str(name),))


def _read(cls: type[T], values: Any, path: Path, readers: Readers) -> T:
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise OptionError(f"must be a table; got {_shown(values)}", path)
    try:
        check_names(cls, values)
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.init and field.name not in values and _is_required(field):
                raise OptionError("is missing", (field.name,))
        hints = _hints(typing.cast("Any", cls))
        return cls(**{name: convert(value, hints[name], (name,), readers) for name, value in values.items()})
    except OptionError as error:
        # Whoever raised it knows the option and not where the table stands.
        raise error.under(path) from None
    except ConfigError as error:
        raise OptionError(str(error), path) from None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def convert(value: Any, hint: Any, path: Path = (), readers: Readers | None = None) -> Any:
    """`value` as the type `hint`.

    Raises:
        OptionError: it is of another; of what stands within it, the first. `path` is where the value stands.
    """
    readers = readers or {}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(origin):
        return _one_of(value, hint, path, readers)
    if hint is None or hint is type(None):
        fits = value is None
    elif origin is typing.Literal:
        # True equals 1 and is another value.
        fits = any(value == choice and type(value) is type(choice) for choice in args)
    elif _is_of(origin, Sequence):
        fits = isinstance(value, list | tuple) and len(value) == len(_items(hint, value))
        if fits:
            parts = zip(_items(hint, value), value, strict=True)
            made = [convert(item, kind, (*path, index), readers) for index, (kind, item) in enumerate(parts)]
            return tuple(made) if origin is tuple or isinstance(value, tuple) else made
    elif _is_of(origin, Mapping):
        fits = isinstance(value, Mapping)
        if fits:
            return {key: convert(item, args[1], (*path, key), readers) for key, item in value.items()}
    elif origin is not None:
        fits = not isinstance(origin, type) or isinstance(value, origin)
    elif hint is Any or not isinstance(hint, type):
        fits = True
    elif hint in readers:
        return value if isinstance(value, hint) else _read_by(readers[hint], value, path)
    elif dataclasses.is_dataclass(hint):
        return _read(typing.cast("type[Any]", hint), value, path, readers)
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if fits:
            return float(value)
    else:
        fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not fits:
        raise _wrong(value, hint, path)
    return value


def _one_of(value: Any, hint: Any, path: Path, readers: Readers) -> Any:
    made, errors, of_tables = [], [], []
    for choice in typing.get_args(hint):
        try:
            made.append(convert(value, choice, path, readers))
        except OptionError as error:
            errors.append(error)
            if dataclasses.is_dataclass(choice) and isinstance(value, Mapping):
                of_tables.append(error)
    for settled in made:
        # A choice that takes it as it is goes before one that turns it into something else.
        if type(settled) is type(value):
            return settled
    if made:
        return made[0]
    # What is wrong in a table, or with it, says more than that a table is what it is.
    within = of_tables or [error for error in errors if len(error.path) > len(path)]
    raise within[0] if len(within) == 1 else _wrong(value, hint, path)


def _read_by(reader: Callable[[Any], Any], value: Any, path: Path) -> Any:
    try:
        return reader(value)
    except OptionError as error:
        raise error.under(path) from None


def _items(hint: Any, value: Sequence[Any]) -> Sequence[Any]:
    """The type of each item of a sequence."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and args and args[-1] is not Ellipsis:
        return args
    return [args[0] if args else Any] * len(value)


def _wrong(value: Any, hint: Any, path: Path) -> OptionError:
    near = ""
    choices = [choice for choice in _choices(hint) if isinstance(choice, str)]
    if isinstance(value, str) and len(choices) > 2:
        near = did_you_mean(value, choices)
    return OptionError(f"must be {describe(hint)}; got {_shown(value)}{near}", path)


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
    if _is_of(origin, Sequence):
        fixed = origin is tuple and args and args[-1] is not Ellipsis
        return f"a list of {len(args)}" if fixed else "a list"
    if dataclasses.is_dataclass(hint) or _is_of(origin, Mapping):
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


def _is_union(origin: Any) -> bool:
    return origin is typing.Union or origin is types.UnionType


def _is_of(origin: Any, kind: type) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)


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
