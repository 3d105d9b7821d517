"""What CONTRIBUTING says of where things go, against where they are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (
    (ROOT / "CONTRIBUTING.md")
    .read_text(encoding="utf-8")
    .partition("## Where would I add")[2]
    .partition("\n## ")[0]
)
ROWS = [
    line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| what"))
]


def paths(text: str) -> list[str]:
    """The files and folders that are named without a word in capitals, which stands for what is new."""
    named = re.findall(r"`((?:src|csrc|tests)/[\w./]+)`", text)
    return [path for path in named if not re.search(r"[A-Z]{3,}", path)]


def defined(path: Path) -> set[str]:
    """The names that a module defines at its top."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        found |= {getattr(target, "id", getattr(target, "name", "")) for target in targets}
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_places_are_there(row: str) -> None:
    missing = [path for path in paths(row) if not (ROOT / path).exists()]
    assert not missing, f"CONTRIBUTING.md, 'Where would I add …', names {missing}: say where it is now"


def test_the_names_are_there() -> None:
    """The tables that take a line."""
    names = {
        "MIXERS": "mixers/registry.py",
        "TABLE": "ops/table.py",
        "FAMILIES": "model/presets.py",
        "PUBLISHED": "model/published.py",
        "CHECKPOINTS": "checkpoints/registry.py",
        "TASKS": "tasks/registry.py",
        "ScheduleName": "training/config.py",
        "BOUNDS": "training/config.py",
        "VERBS": "cli/__init__.py",
        "MACHINES": "model/machine.py",
    }
    for name, file in names.items():
        assert f"`{name}`" in TABLE, f"CONTRIBUTING.md does not name {name}"
        assert name in defined(ROOT / "src" / "intarsia" / file), (
            f"CONTRIBUTING.md names {name}: not in {file}"
        )
    assert all((ROOT / path).exists() for path in paths(TABLE))
