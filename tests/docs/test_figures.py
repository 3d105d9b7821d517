"""The script behind the README's figure and table, on a verdict of the form that comparisons write."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from intarsia.mixers.registry import MIXERS

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
SCRIPT = FIGURES / "demo.py"


def estimate(value: float) -> dict[str, object]:
    return {"value": value, "interval": {"low": value - 0.02, "high": value + 0.03}}


def arm(name: str, scale: float) -> dict[str, object]:
    decoding = [
        {"context": context, "milliseconds": scale, "cache_bytes": int(context * 1000 * scale)}
        for context in (256, 1024, 4096)
    ]
    return {
        "name": name,
        "layout": "kda kda kda mla",
        "parameters": 1_031_142,
        "measurements": {"decoding": decoding, "training_tokens_per_second": 2500.4},
    }


VERDICT = {
    "sentence": "No difference between a & b that this budget can show.",
    "arms": [arm("a", 2.0), arm("b", 3.0)],
    "rows": [
        {"name": "a", "note": "", "is_baseline": False, "estimate": estimate(2.1)},
        {"name": "b", "note": "", "is_baseline": False, "estimate": estimate(2.2)},
        {"name": "bigram", "note": "counts", "is_baseline": True, "estimate": estimate(2.9)},
    ],
    "tokens_per_run": 300_000,
    "plan": {"seeds": [1, 2, 3]},
    "documents": 200,
    "corpus": "python",
    "seconds": 300.0,
    "environment": {"processor": "a CPU", "jobs": 2, "threads": 1},
}


def test_the_figure_is_well_formed() -> None:
    picture = ElementTree.fromstring(runpy.run_path(str(SCRIPT))["figure"](VERDICT))
    assert picture.get("aria-label") == VERDICT["sentence"]
    texts = {element.text for element in picture.iter() if element.tag.endswith("text")}
    assert {"a", "b", "bigram", "4 k"} <= texts


def test_the_table_has_a_row_for_each_model() -> None:
    lines = runpy.run_path(str(SCRIPT))["table"](VERDICT).splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "| `a` | kda kda kda mla | 1.03 M | 2.100 [2.080, 2.130] | 2,500 | 8.19 MB | 2.0 |" in lines
    assert "> " + str(VERDICT["sentence"]) in lines


@pytest.mark.parametrize("name", ["kernels", "archaeology", "sparse"])
def test_a_figure_is_the_one_that_its_script_draws(name: str) -> None:
    figure = str(runpy.run_path(str(FIGURES / f"{name}.py"))["figure"]())
    ElementTree.fromstring(figure)
    file = FIGURES / f"{name}.svg"
    run = f"docs/figures/{name}.svg is not what its script draws: run .venv/bin/python docs/figures/{name}.py"
    assert file.read_text(encoding="utf-8") == figure + "\n", run


@pytest.mark.parametrize("page", ["README.md", "docs/archaeology.md"])
def test_the_tables_of_mixers_hold_all_of_them(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    expected = runpy.run_path(str(FIGURES / "mixers.py"))["written"](page, text)
    wrong = [line for line in expected.splitlines() if line not in text.splitlines()]
    told = "\n".join([f"{page} should hold these lines: run .venv/bin/python docs/figures/mixers.py", *wrong])
    assert text == expected, told


@pytest.mark.parametrize("page", ["README.md", "docs/mixers.md", "docs/archaeology.md"])
def test_the_pages_on_mixers_name_all_of_them(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = [name for name in MIXERS if f"`{name}`" not in text]
    where = {"README.md": "under 'The layers'", "docs/mixers.md": "a row of the table under 'What there is'"}
    place = where.get(page, "in its story")
    assert not missing, f"{page} does not name {', '.join(missing)}: write each there, {place}"


def test_the_page_tells_no_mixer_that_is_not_there() -> None:
    table = (ROOT / "docs" / "mixers.md").read_text(encoding="utf-8").partition("## What there is")[2]
    table = table.partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name.strip(" `") for cell in cells for name in cell.split(",")}
    gone = ", ".join(sorted(named - set(MIXERS)))
    assert not gone, (
        f"docs/mixers.md has a row for {gone}, which intarsia.mixers.registry.MIXERS does not name"
    )


def test_the_table_of_checkpoints_is_what_the_families_say() -> None:
    script = runpy.run_path(str(FIGURES / "checkpoints.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert script["with_table"](page) == page, "run docs/figures/checkpoints.py"


def test_the_table_of_tasks_is_what_the_tasks_say() -> None:
    script = runpy.run_path(str(FIGURES / "tasks.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert script["with_table"](page) == page, "run docs/figures/tasks.py"
