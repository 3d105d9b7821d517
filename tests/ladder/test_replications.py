"""The plans of `examples/replications`: each loads at every size, is named in the docs, and starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from intarsia.ladder import load_ladder, load_plan
from intarsia.ladder.arms import resolve
from intarsia.ladder.plan_tables import PlanError

ROOT = Path(__file__).parents[2]
ALL = sorted((ROOT / "examples" / "replications").glob("*.toml"))
LADDERS = [path for path in ALL if "[[sizes]]" in path.read_text(encoding="utf-8")]
PLANS = [path for path in ALL if path not in LADDERS]


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
    # What a laptop cannot teach in its time is in the full size alone, behind what both have.
    assert bool(plan.examined_on) == bool(full.examined_on)
    for exam, other in zip(plan.examined_on, full.examined_on, strict=False):
        assert (exam.task, tuple(exam.dials)) == (other.task, tuple(other.dials))
        assert other.steps > exam.steps


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.stem)
def test_each_ladder_has_three_sizes_and_its_arms_can_be_matched(path: Path) -> None:
    ladder, quick, full = (load_ladder(path, **size) for size in ({}, {"quick": True}, {"full": True}))
    assert [each.name for each in (ladder, quick, full)] == [
        path.stem,
        f"{path.stem}-quick",
        f"{path.stem}-full",
    ]
    assert ladder.arms == full.arms
    assert len(ladder.sizes) >= 3, "or no law can be fitted"
    for each in (ladder, full):
        assert len(each.rungs[0].plan.seeds) >= 3
        assert not each.rungs[0].plan.full
    widths = [[size.model["d_model"] for size in each.sizes] for each in (ladder, full)]
    assert max(widths[0]) < min(widths[1])
    for each in (ladder, quick, full):
        for rung in each.rungs:
            if rung.is_first:
                vocab_size = int(rung.plan.corpus.tokenizer.removeprefix("bpe:"))
                sizes = [arm.non_embedding_parameters for arm in resolve(rung.plan, vocab_size)]
                assert max(sizes) / min(sizes) < 1.021, rung.name


def test_the_docs_name_them_all() -> None:
    page = (ROOT / "docs" / "replications.md").read_text(encoding="utf-8")
    assert PLANS
    assert LADDERS
    for path in ALL:
        assert f"`{path.name}`" in page


def test_a_plan_without_a_full_size_says_so() -> None:
    with pytest.raises(PlanError, match="full is missing: the plan has no other size than its own"):
        load_plan(ROOT / "examples" / "demo.toml", full=True)
    with pytest.raises(PlanError, match="not both"):
        load_plan(PLANS[0], quick=True, full=True)
    with pytest.raises(PlanError, match="full is missing: the plan has no other size than its own"):
        load_ladder(ROOT / "examples" / "ladder.toml", full=True)
    with pytest.raises(PlanError, match="not both"):
        load_ladder(LADDERS[0], quick=True, full=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_each_starts_with_one_command(path: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "intarsia",
        "ladder" if path in LADDERS else "compare",
        str(path),
        "--quick",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text(encoding="utf-8"))
    if path in LADDERS:
        assert [rung["name"] for rung in verdict["rungs"]] == ["xs-20steps", "s-20steps"]
    assert list((tmp_path / "out").rglob("outcome.json"))
    assert not list((tmp_path / "out").rglob("failure.json"))
