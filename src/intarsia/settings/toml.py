"""TOML: read from files, written, and the line in which an option stands."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intarsia.errors import ConfigError


def load(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a TOML file, and its text, for `line_of`.

    Raises:
        ConfigError: there is no such file, or it is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def dumps(values: Mapping[str, Any]) -> str:
    """Write JSON-able values as TOML. None and empty tables, which TOML cannot say or need not, are left out."""
    return "\n".join(_table(values, ())).strip() + "\n"


def _table(values: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines: list[str] = []
    later: list[str] = []
    for key, value in values.items():
        name = ".".join(_key(part) for part in (*path, key))
        if value is None or value == {}:
            continue
        if isinstance(value, Mapping):
            body = _table(value, (*path, key))
            # A table that holds tables alone needs no header of its own.
            if body:
                later += [*(["", f"[{name}]"] if body[0] else []), *body]
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            for item in value:
                later += ["", f"[[{name}]]", *_table(item, (*path, key))]
        else:
            lines.append(f"{_key(key)} = {_value(value)}")
    return lines + later


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    # A JSON string is a TOML basic string, but for the delete character.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, float):
        text = repr(value)
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(text, text)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value if item is not None)}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inner} }}"
    raise TypeError(f"TOML has no form for {type(value).__name__}")


def line_of(text: str, path: tuple[str | int, ...]) -> int | None:
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
            name: tuple[str | int, ...] = _parts_of(header[1])
            # Tables inside an element of an array, as [arms.model], belong to the newest element.
            name = _placed(name, counts)
            counts[name] = counts.get(name, -1) + 1
            table = (*name, counts[name])
            places.setdefault(name, number)
            places.setdefault(table, number)
        elif header := re.match(r"\s*\[([^\]]+)\]", line):
            table = _placed(_parts_of(header[1]), counts)
            places.setdefault(table, number)
        elif key := re.match(r"""\s*([\w.\-"']+)\s*=(.*)""", line):
            keys = _parts_of(key[1])
            for length in range(1, len(keys) + 1):
                places.setdefault((*table, *keys[:length]), number)
            for mark in ('"""', "'''"):
                if key[2].count(mark) == 1:
                    quoted = mark
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    return None


def _parts_of(dotted: str) -> tuple[str, ...]:
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
