"""A whole small ladder, for real: rungs, gates, a shared stable phase, going on, and growing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from intarsia.ladder import LadderPlan, PlanError, climb
from intarsia.ladder.run_folder import RunFolder
from intarsia.ladder.run_spec import RunSpec
from support.small_corpus import texts

PLAN: dict[str, Any] = {
    "name": "small",
    "seeds": [1],
    "corpus": {"tokenizer": "bytes", "heldout": 0.3},
    "training": {"rows": 2, "length": 64, "decay_fraction": 0.5, "log_every": 2},
    "tuning": {"learning_rates": [5e-3], "documents": 6},
    "evaluation": {"documents": 12, "tokens_per_document": 100, "resamples": 1000},
    "figures": {"contexts": [], "throughput_steps": 0, "sample_tokens": 0},
    "model": {
        "d_model": 16,
        "mixers": {
            "mla": {"num_heads": 1, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "v_dim": 8},
            "kda": {"num_heads": 1, "head_dim": 8},
        },
        "feed_forward": {"d_hidden": 48},
    },
    "matching": {"tolerance": 0.02},
    "baselines": "none",
    "gates": {"baseline": "full", "margin": 8.0},
    "sizes": [{"name": "flat", "steps": [8, 16], "model": {"depth": 1}}],
    "arms": [
        {"name": "linear", "preset": "kimi-linear-nano", "model": {"layout": "kda"}},
        {"name": "full", "preset": "full-nano"},
    ],
}
WHOLE: dict[str, Any] = {
    **PLAN,
    "gates": {"baseline": "full", "margin": 0.3},
    "sizes": [*PLAN["sizes"], {"name": "deep", "steps": [8], "model": {"depth": 2}}],
    "arms": [
        # It learns nothing at such a rate.
        {"name": "slow", "preset": "kimi-linear-nano", "model": {"layout": "kda"}, "learning_rates": [1e-8]},
        {"name": "full", "preset": "full-nano"},
        {"name": "twin", "preset": "full-nano"},
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ladder")


@pytest.fixture(scope="module")
def corpus(place: Path) -> dict[str, Any]:
    return {**PLAN["corpus"], "source": texts(place / "texts")}


@pytest.fixture(scope="module")
def plan(corpus: dict[str, Any]) -> dict[str, Any]:
    """One size, two arms and nothing that stops them."""
    return {**PLAN, "corpus": corpus}


@pytest.fixture(scope="module")
def whole(corpus: dict[str, Any]) -> dict[str, Any]:
    """Two sizes, and an arm that a gate stops."""
    return {**WHOLE, "corpus": corpus}


def run(plan: dict[str, Any], directory: Path) -> tuple[dict[str, Any], str]:
    with (directory.parent / f"{directory.name}.log").open("w+") as file:
        climb(LadderPlan.from_dict(plan), directory, jobs=2, console=Console(file=file, width=160))
        file.seek(0)
        return json.loads((directory / "verdict.json").read_text()), file.read()


@pytest.fixture(scope="module")
def small(place: Path, plan: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """verdict.json of the small climb, and what was printed."""
    return run(plan, place / "small")


@pytest.fixture(scope="module")
def done(place: Path, whole: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """verdict.json of an undisturbed climb of the whole ladder, and what was printed."""
    return run(whole, place / "out")


def arms(found: dict[str, Any], rung: int) -> dict[str, Any]:
    return {arm["name"]: arm for arm in found["rungs"][rung]["arms"]}


def test_every_arm_climbs_that_is_not_shown_to_be_worse(
    small: tuple[dict[str, Any], str], place: Path
) -> None:
    found, _ = small
    assert [rung["name"] for rung in found["rungs"]] == ["flat-8steps", "flat-16steps"]
    for rung in range(2):
        assert list(arms(found, rung)) == ["linear", "full"]
        assert all(arm["gate"]["climbs"] for arm in arms(found, rung).values())
    assert found["stopped"] == {}
    assert arms(found, 1)["full"]["bits_per_byte"]["value"] < arms(found, 0)["full"]["bits_per_byte"]["value"]


def test_a_larger_budget_goes_on_from_the_stable_phase(
    small: tuple[dict[str, Any], str], place: Path
) -> None:
    for path in (place / "small" / "rungs" / "flat-16steps" / "runs").iterdir():
        spec = RunSpec.load(path)
        assert spec.branches_from is not None
        assert spec.branches_from.endswith("@4"), "half of eight steps have a falling rate"
        lineage = json.loads((path / "train" / "config.json").read_text())["lineage"]
        assert lineage["step"] == 4
        assert "flat-8steps" in lineage["run"]
        # Only the checkpoint for longer runs is kept.
        assert [each.name for each in (path / "train" / "checkpoints").iterdir()] == ["step-000008"]


def test_the_report_has_all_rungs(small: tuple[dict[str, Any], str], place: Path) -> None:
    text = (place / "small" / "report.html").read_text()
    for rung in small[0]["rungs"]:
        assert f'href="{rung["directory"]}/report.html"' in text
        assert (place / "small" / rung["directory"] / "report.html").is_file()
    assert "needs at least 6 runs" in text or "at least 3 different sizes" in text, "why there is no law"
    assert small[0]["laws"]["full"]["why_not"]


@pytest.mark.slow
def test_an_arm_that_is_shown_to_be_worse_stops(done: tuple[dict[str, Any], str], place: Path) -> None:
    found, printed = done
    assert [rung["name"] for rung in found["rungs"]] == ["flat-8steps", "flat-16steps", "deep-8steps"]
    first = arms(found, 0)
    assert not first["slow"]["gate"]["climbs"]
    assert first["slow"]["gate"]["difference"] > 0.3
    assert "With one seed, which shows no interval" in first["slow"]["gate"]["reason"]
    assert first["slow"]["gate"]["reason"].endswith("beyond the margin of 0.3.")
    assert first["twin"]["gate"]["climbs"]
    assert list(arms(found, 1)) == list(arms(found, 2)) == ["full", "twin"]
    assert found["stopped"] == {"slow": first["slow"]["gate"]["reason"]}
    assert "Stopped at a gate: slow after flat-8steps." in found["sentence"]
    kept = json.loads((place / "out" / "rungs" / "flat-8steps" / "gates.json").read_text())
    assert kept["decisions"] == [first[name]["gate"] for name in ("slow", "full", "twin")]
    assert kept["before"] == []
    assert "slow stops. With one seed" in printed


@pytest.mark.slow
def test_arms_that_are_the_same_get_the_same(done: tuple[dict[str, Any], str]) -> None:
    for rung in range(3):
        full, twin = (arms(done[0], rung)[name] for name in ("full", "twin"))
        assert full["bits_per_byte"]["value"] == twin["bits_per_byte"]["value"]
        assert twin["gate"]["difference"] == 0


@pytest.mark.slow
def test_what_goes_on_has_the_numbers_of_a_run_from_the_start(
    done: tuple[dict[str, Any], str], place: Path, tmp_path: Path
) -> None:
    """To the bit."""
    rung = place / "out" / "rungs" / "flat-16steps"
    folder = RunFolder(next(rung.glob("runs/full-*seed1-*")))
    spec = RunSpec.load(folder.path)
    assert spec.branches_from is not None
    alone = RunFolder(tmp_path / folder.path.name)
    alone.claim(replace(spec, branches_from=None))
    subprocess.run([sys.executable, "-m", "intarsia.ladder.worker", str(alone.path)], check=True)
    assert json.loads((alone.train / "config.json").read_text())["lineage"] is None
    for name in ("bits_per_byte", "batches", "steps", "tokens"):
        one, other = (json.loads(each.outcome.read_text())[name] for each in (folder, alone))
        assert one == other, name
    with np.load(folder.evaluation) as one, np.load(alone.evaluation) as other:
        assert np.array_equal(one["nll"], other["nll"])
    # The other size is another model.
    deep = RunSpec.load(next((place / "out" / "rungs" / "deep-8steps" / "runs").iterdir()))
    assert deep.branches_from is None


@pytest.mark.slow
def test_a_ladder_grows_by_an_arm(
    done: tuple[dict[str, Any], str], place: Path, whole: dict[str, Any]
) -> None:
    """What is there is used; what is new is made."""

    def outcomes() -> dict[str, int]:
        return {
            str(path.relative_to(place)): path.stat().st_mtime_ns
            for path in place.glob("out/rungs/*/runs/*/outcome.json")
        }

    before = outcomes()
    more = [*whole["arms"], {"name": "new", "preset": "full-nano", "learning_rates": [1e-8]}]
    found, _ = run({**whole, "arms": more}, place / "out")
    after = outcomes()
    assert {name: after[name] for name in before} == before
    made = sorted(name.split("/")[4] for name in after.keys() - before.keys())
    assert [name.rsplit("-", 1)[0] for name in made] == ["new-lr1e-08-seed1"]
    assert set(found["stopped"]) == {"slow", "new"}
    value = arms(found, 2)["full"]["bits_per_byte"]["value"]
    assert value == arms(done[0], 2)["full"]["bits_per_byte"]["value"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": []}, "sizes: a ladder needs at least one size"),
        (
            {"sizes": [{"name": "a"}]},
            r"sizes\[0\]: the size 'a' needs the amounts of one of tokens, .* it has none",
        ),
        ({"sizes": [{"name": "a", "steps": [4, 2]}]}, r"sizes\[0\].steps must grow; got \[4, 2\]"),
        ({"sizes": [{"name": "a", "steps": [4]}] * 2}, r"two sizes are called 'a'"),
        (
            {"sizes": [{"name": "a", "steps": [4], "model": {"dept": 1}}]},
            r"sizes\[0\].model.dept: at the rung a-4steps: unknown option",
        ),
        ({"sizes": [{"name": "a", "flops": [10.0]}]}, r"at the rung a-10flops: for slow it allows no step"),
        ({"gates": {"baseline": "fool"}}, r"gates.baseline: no arm 'fool'; did you mean 'full'"),
        ({"gates": {"margn": 0.1}}, r"gates.margn: unknown option; did you mean 'margin'"),
        ({"matching": {"reference": "slow"}}, "matching.reference: arms are matched to the baseline, full"),
        ({"budget": {"steps": 3}}, "budget: a ladder's budgets are those of its sizes"),
        (
            {"matching": {"adjust": False, "tolerance": 0.001}},
            r"at the rung flat-8steps: slow cannot be matched to full: .* the plan forbids changes",
        ),
    ],
)
def test_ladders_that_cannot_be_climbed(
    place: Path, whole: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        run({**whole, **changes}, place / "impossible")
    assert not (place / "impossible" / "rungs").exists()
