"""What the verbs print: tables for people, JSON for programs, and numbers in a form that can be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def print_json(value: Any) -> None:
    """Print `value` as JSON on stdout, where nothing else may go."""
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()  # a full disk is found here and not on the way out


def note(text: str) -> None:
    """Print a remark on stderr, so that stdout holds the result alone."""
    print(text, file=sys.stderr, flush=True)


def table(*columns: str, title: str | None = None, left: Sequence[int] = (0,)) -> Table:
    """A table of numbers: columns flush right but for those numbered in `left`."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number in left else "right", no_wrap=number == 0)
    return made


def show(*parts: Any) -> None:
    """Print tables and text on stdout, coloured where that is a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    for part in parts:
        # Text is left to the terminal to wrap, so that what is copied or piped has the lines that were meant.
        text = isinstance(part, str)
        console.print(part, markup=not text, soft_wrap=text)


def count(number: float) -> str:
    """`49.12 B`, `1.5 M`, `730`: a number in three to four digits."""
    for factor, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= factor:
            return f"{number / factor:.{2 if abs(number) < 100 * factor else 1}f}{suffix}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """`1.5 MiB`: bytes in binary units."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(number) >= 1024**power:
            return f"{number / 1024**power:.1f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """`1.5 ms`, `12 s`: seconds in the unit that suits them."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return (
                f"{seconds / unit:,.3g} {name}" if seconds < 1000 * unit else f"{seconds / unit:,.0f} {name}"
            )
    return f"{seconds * 1e9:.3g} ns"
