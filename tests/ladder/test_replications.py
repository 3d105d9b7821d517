"""The plans of `examples/replications`: each loads at every size, is named in the docs, and starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from intarsia.ladder import load_plan
from intarsia.ladder.plan_tables import PlanError

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "examples" / "replications").glob("*.toml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_each_has_three_sizes(path: Path) -> None:
    plan, quick, full = (load_plan(path, **size) for size in ({}, {"quick": True}, {"full": True}))
    assert plan.name == path.stem
    assert (quick.name, full.name) == (f"{path.stem}-quick", f"{path.stem}-full")
    assert [arm.name for arm in plan.arms] == [arm.name for arm in full.arms]
    assert len(plan.seeds) >= 3
    assert not quick.full
    assert not full.full
    wide, wider = plan.model["d_model"], full.model["d_model"]
    assert wider > wide, "the size at which the question was asked"
    for exam, other in zip(plan.examined_on, full.examined_on, strict=True):
        assert (exam.task, tuple(exam.dials)) == (other.task, tuple(other.dials))
        assert other.steps > exam.steps


def test_the_docs_name_them_all() -> None:
    page = (ROOT / "docs" / "replications.md").read_text(encoding="utf-8")
    assert PLANS
    for path in PLANS:
        assert f"`{path.name}`" in page


def test_a_plan_without_a_full_size_says_so() -> None:
    with pytest.raises(PlanError, match="full is missing: the plan has no other size than its own"):
        load_plan(ROOT / "examples" / "demo.toml", full=True)
    with pytest.raises(PlanError, match="not both"):
        load_plan(PLANS[0], quick=True, full=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_each_starts_with_one_command(path: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "intarsia",
        "compare",
        str(path),
        "--quick",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text(encoding="utf-8"))
    runs = [run for exam in verdict["exams"] for arm in exam["arms"] for run in arm["runs"]]
    runs += [run for arm in verdict["arms"] for run in arm.get("runs", ())]
    assert runs
    assert not [run for run in runs if run["failure"]]
