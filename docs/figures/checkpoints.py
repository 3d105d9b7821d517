"""The table of families in checkpoints.md, from what the families say of themselves.

    .venv/bin/python docs/figures/checkpoints.py

writes what stands between the `families` marks of the page.
"""

from __future__ import annotations

import re
from pathlib import Path

from intarsia.checkpoints.registry import CHECKPOINTS, family
from intarsia.files import write_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- families: written by docs/figures/checkpoints.py -->\n", "<!-- /families -->"


def table() -> str:
    """The table in Markdown."""
    lines = [
        "| family | models | `model_type` | loads, saves | parity with | missing |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in CHECKPOINTS:
        of = family(name)
        types = ", ".join(f"`{kind}`" for kind in of.model_types)
        lines.append(
            f"| `{name}` | {of.title} | {types} | {'loads' if of.write is None else 'both'} | {of.oracle} | "
            f"{of.missing or 'nothing known'} |"
        )
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the table as it is now."""
    return re.sub(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + table() + END, page, flags=re.DOTALL
    )


if __name__ == "__main__":
    write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8")))
