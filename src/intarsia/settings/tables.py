"""Tables of options: laid over each other, and with a word for "no value"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it; tables are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = (
            merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


#: TOML has no word for "no value"; in tables that are options of something else, this is it.
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
