"""The page on adding a mixer shows the example's files as they are."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from intarsia.mixers.plugins import VARIABLE
from intarsia.model import presets

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "new_mixer"


def test_the_page_shows_the_files() -> None:
    page = (ROOT / "docs" / "new-mixer.md").read_text(encoding="utf-8")
    source = (EXAMPLE / "learned_decay.py").read_text(encoding="utf-8")
    told = (
        "docs/new-mixer.md must show examples/new_mixer/learned_decay.py as it is: copy it to its first block"
    )
    assert f"```python run\n{source}```" in page, told
    project = (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")
    (lines,) = [block for block in toml_blocks(page) if "entry-points" in block]
    assert lines in project, (
        "docs/new-mixer.md must show lines of examples/new_mixer/pyproject.toml as they are"
    )


def test_the_model_of_the_page_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(EXAMPLE / "learned_decay.py"))
    page = (ROOT / "docs" / "new-mixer.md").read_text(encoding="utf-8")
    (text,) = [block for block in toml_blocks(page) if "[model]" in block]
    config = presets.configure(None, tomllib.loads(text)["model"], vocab_size=256)
    assert config.layers == ("learned", "learned", "learned", "mla")


def toml_blocks(page: str) -> list[str]:
    """The TOML that a page shows."""
    return [part.partition("```")[0] for part in page.split("```toml\n")[1:]]
