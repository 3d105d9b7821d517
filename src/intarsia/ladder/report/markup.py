"""HTML and SVG as nested calls. Text is always escaped; only `Markup` made here is not."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

#: Elements that have no content and no end tag in HTML; in SVG they are closed all the same.
_VOID = frozenset({"br", "hr", "meta", "link", "col"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. `class_` and `for_` stand for the reserved words, `_` in names for `-`; None leaves out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(_number(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Children one after the other, escaped where they are plain text."""
    parts = []
    for child in children:
        if child is None or child is False:
            continue
        if isinstance(child, Markup):
            parts.append(str(child))
        elif isinstance(child, str):
            parts.append(escape(child, quote=False))
        elif isinstance(child, Iterable):
            parts.append(str(join(*child)))
        else:
            parts.append(escape(_number(child)))
    return Markup("".join(parts))


def _attribute(text: str) -> str:
    return escape(text, quote=False).replace('"', "&quot;")


def _number(value: object) -> str:
    # A tenth of a unit is enough for any figure and keeps the page small.
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
