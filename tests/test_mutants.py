"""The table of mutants is of the code that there is."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MUTANTS = runpy.run_path(str(ROOT / "tests" / "mutants" / "table.py"))["MUTANTS"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place(mutant) -> None:
    told = f"tests/mutants/table.py: {mutant.name!r} is of a text that {mutant.file} should hold once"
    file = ROOT / mutant.file
    assert file.is_file(), told
    assert file.read_text(encoding="utf-8").count(mutant.old) == 1, f"{told}:\n{mutant.old}"
    tests = [word for word in mutant.tests.split() if word.startswith("tests/")]
    assert all((ROOT / test).exists() for test in tests), (
        f"{told}, and of tests that are there: {mutant.tests}"
    )
