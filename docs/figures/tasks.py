"""The table of tasks in docs/tasks.md, from what the tasks tell of themselves.

.venv/bin/python docs/figures/tasks.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from intarsia.files import write_text
from intarsia.tasks.registry import EXAMS

PAGE = Path(__file__).resolve().parents[1] / "tasks.md"
BEGIN, END = "<!-- tasks: written by docs/figures/tasks.py -->\n", "<!-- /tasks -->"


def table() -> str:
    """A row a task."""
    lines = ["| name | an example | dials | source |", "| --- | --- | --- | --- |"]
    for kind in EXAMS:
        about = " ".join(inspect.getdoc(kind).partition("\n\n")[0].split())  # type: ignore[union-attr]
        dials = [f"`{f.name}`" for f in dataclasses.fields(kind) if f.name != "length"]
        source = re.sub(r"arXiv:(\d+\.\d+)", r"[\1](https://arxiv.org/abs/\1)", kind.source)
        lines.append(f"| `{kind.type}` | {about} | {' '.join(dials)} | {source} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the table as it should be."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"no mark where the table begins: {BEGIN}"
    assert end, f"no mark where the table ends: {END}"
    return f"{before}{begin}{table()}{end}{after}"


if __name__ == "__main__":
    write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8")))
