"""Exams of a plan, for real: tasks learned in child processes, rates chosen, seeds examined, what is done skipped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from intarsia.checkpoints.native import load_extra, load_model
from intarsia.ladder import Plan, Verdict, compare
from intarsia.ladder.plan_tables import PlanError
from intarsia.ladder.report.parts import exam_cell
from intarsia.ladder.results import ExamArm, ExamScores, Failure, RunResult
from intarsia.ladder.run_spec import RunSpec, TaskLesson
from intarsia.tasks import Answers, examine, make_task

PLAN: dict[str, Any] = {
    "name": "examined",
    "seeds": [1, 2],
    "tuning": {"learning_rates": [1e-2]},
    "model": {"d_model": 16, "depth": 1, "feed_forward": {"d_hidden": 32}, "init_std": 0.25},
    "arms": [
        {"name": "kda", "model": {"layout": "kda", "mixers": {"kda": {"type": "kda", "num_heads": 1, "head_dim": 16}}}},
        # Its loss leaves the finite numbers after a few steps.
        {"name": "wild", "learning_rates": [1e35],
         "model": {"layout": "kda", "mixers": {"kda": {"type": "kda", "num_heads": 1, "head_dim": 16}}}},
    ],
    "examined_on": [
        {"task": "palindrome", "name": "short", "options": {"length": 5, "symbols": 3}, "steps": 12,
         "examples": 16, "examine_every": 6, "dials": {"length": [5, 8], "symbols": [2, 3]}},
        {"task": "zoology-mqar", "name": "pairs", "options": {"length": 16, "vocabulary": 16}, "steps": 4,
         "examples": 8, "examine_every": 4, "mixed": {"pairs": [1, 4]}},
    ],
}  # fmt: skip
TUNED = {**PLAN["examined_on"][0], "name": "tuned", "learning_rates": [1e-2, 1e-6], "steps": 8, "dials": {}}


def run(plan: dict[str, Any], directory: Path) -> tuple[Verdict, str, dict[str, Any]]:
    with (directory.parent / f"{directory.name}.log").open("w+") as file:
        verdict = compare(Plan.from_dict(plan), directory, jobs=2, console=Console(file=file, width=120))
        file.seek(0)
        return verdict, file.read(), json.loads((directory / "verdict.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verdict, str, dict[str, Any]]:
    place = tmp_path_factory.mktemp("exams") / "out"
    plan = {**PLAN, "arms": PLAN["arms"][:1], "examined_on": [TUNED]}
    run({**plan, "seeds": [2]}, place)
    # One more exam, arm and seed: what is done is not done again.
    before = {path: path.stat().st_mtime_ns for path in place.glob("exams/*/outcome.json")}
    outcome = run(PLAN | {"examined_on": [*PLAN["examined_on"]], "seeds": [1, 2]}, place)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(before) == 3, "two rates and a seed"
    return (place, *outcome)


def test_arms_are_examined_with_each_seed(done: tuple[Path, Verdict, str, dict[str, Any]]) -> None:
    place, verdict, printed, found = done
    exam = found["exams"][0]
    kda, wild = exam["arms"]
    assert [run["seed"] for run in kda["runs"]] == [1, 2]
    shares = [run["test"]["answers"]["accuracy"] for run in kda["runs"]]
    assert kda["answers"] == pytest.approx(
        {"mean": sum(shares) / 2, "least": min(shares), "most": max(shares)}
    )
    assert all(run["test"]["answers"]["asked"] == 16 for run in kda["runs"]), (
        "one answer in each of 16 examples"
    )
    assert [run["failure"]["kind"] for run in wild["runs"]] == ["diverged", "diverged"]
    assert wild["answers"] == {"mean": 0.0, "least": 0.0, "most": 0.0}, (
        "a model that came apart knows nothing"
    )
    assert "right answers in %" in printed
    assert f"{100 * kda['answers']['mean']:.1f} (" in printed
    assert verdict.best is None
    assert "Nothing was judged by text" in verdict.sentence
    page = (place / "report.html").read_text()
    assert "The exams" in page
    assert f"{100 * kda['answers']['mean']:.1f} (" in page
    assert "4 of 8 runs failed" in page


def test_the_models_are_kept_and_give_the_same_answers(
    done: tuple[Path, Verdict, str, dict[str, Any]],
) -> None:
    place, _, _, found = done
    for run in found["exams"][0]["arms"][0]["runs"]:
        folder = place / "exams" / run["directory"]
        spec = RunSpec.load(folder)
        model = load_model(folder / "train" / "model")
        answers = examine(model, spec.lesson.made, seed=run["seed"], examples=16)
        assert answers.score.right_tokens == run["test"]["answers"]["right"]
        assert load_extra(folder / "train" / "model")["exam"] == {
            "task": "palindrome", "options": {"length": 5, "symbols": 3}, "seed": run["seed"],
        }  # fmt: skip


def test_models_are_examined_under_every_combination_of_the_dials(
    done: tuple[Path, Verdict, str, dict[str, Any]],
) -> None:
    place, _, _, found = done
    exam = found["exams"][0]
    assert exam["dials"] == {"length": [5, 8], "symbols": [2, 3]}
    turns = [{"length": length, "symbols": symbols} for length in (5, 8) for symbols in (2, 3)]
    for run in exam["arms"][0]["runs"]:
        assert [turn["options"] for turn in run["turns"]] == turns
        model = load_model(place / "exams" / run["directory"] / "train" / "model")
        for turn in run["turns"]:
            again = examine(model, make_task("palindrome", turn["options"]), seed=run["seed"], examples=16)
            assert turn["test"]["answers"]["right"] == again.score.right_tokens
            assert turn["test"]["answers"]["asked"] == again.score.tokens
        assert run["turns"][1]["test"] == run["test"], "the options that it was trained on"
    page = (place / "report.html").read_text()
    assert "short under other options" in page
    assert page.count("--share: ") == 8
    mean = sum(run["turns"][2]["test"]["answers"]["accuracy"] for run in exam["arms"][0]["runs"]) / 2
    assert f">{100 * mean:.1f}<" in page


def test_a_mixed_exam_is_learned_and_asked_in_turn(
    done: tuple[Path, Verdict, str, dict[str, Any]],
) -> None:
    place, _, _, found = done
    _, exam = found["exams"]
    assert exam["mixed"] == {"pairs": [1, 4]}
    run = exam["arms"][0]["runs"][0]
    assert run["test"]["answers"]["asked"] == 4 * 1 + 4 * 4
    spec = RunSpec.load(place / "exams" / run["directory"])
    assert isinstance(spec.lesson, TaskLesson)
    assert spec.lesson.modules[1:] == ("intarsia.tasks.zoology", "intarsia.tasks.mixed")
    again = examine(
        load_model(place / "exams" / run["directory"] / "train" / "model"),
        spec.lesson.made,
        seed=run["seed"],
        examples=8,
    )
    assert again.score.right_tokens == run["test"]["answers"]["right"]
    assert "length 16, vocabulary 16, pairs 1, 4 in turn" in (place / "report.html").read_text()


@pytest.mark.parametrize(
    ("mixed", "message"),
    [
        ({"pairs": [4, 4]}, r"mixed\.pairs must be a list of different values"),
        ({"paris": [4]}, r"mixed\.paris: with paris 4: unknown option; did you mean 'pairs'"),
        ({"pairs": [4, 5]}, r"mixed: with pairs 5: .*take 20 tokens; the length is 16"),
        ({"length": [16, 32]}, r"mixed: all parts must have the length, 16; one has 32"),
        ({"vocabulary": [16, 32]}, r"mixed: all parts must have the same tokens; one has 32 and another 16"),
    ],
)
def test_mixtures_that_cannot_be(mixed: dict[str, Any], message: str) -> None:
    exam = {**PLAN["examined_on"][1], "mixed": mixed}
    with pytest.raises(PlanError) as failure:
        Plan.from_dict({**PLAN, "examined_on": [exam]})
    assert re.search(message, str(failure.value)), str(failure.value)


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"length": 8}, r"dials\.length must be a list; got 8"),
        ({"length": []}, r"dials\.length must be a list of different values"),
        ({"length": [8, 8]}, r"dials\.length must be a list of different values"),
        ({"lenght": [8]}, r"dials\.lenght: with lenght 8: unknown option; did you mean 'length'"),
        (
            {"symbols": [3, 30]},
            r"dials: with symbols 30 the task has 31 different tokens, and the models learn 4",
        ),
        ({"length": [8, -1]}, r"dials\S* with length -1"),
    ],
)
def test_dials_that_cannot_be(dials: dict[str, Any], message: str) -> None:
    exam = {**PLAN["examined_on"][0], "dials": dials}
    with pytest.raises(PlanError) as failure:
        Plan.from_dict({**PLAN, "examined_on": [exam]})
    assert re.search(message, str(failure.value)), str(failure.value)


def test_rates_are_chosen_by_the_validation(done: tuple[Path, Verdict, str, dict[str, Any]]) -> None:
    tried = {}
    for path in (done[0] / "exams").glob("tuned-*/spec.json"):
        spec, outcome = RunSpec.load(path.parent), json.loads((path.parent / "outcome.json").read_text())
        if spec.role == "judged":
            assert outcome["test"] is not None
            chosen = spec.learning_rate
        else:
            assert spec.seed == 0
            assert outcome["test"] is None, "nobody can choose by what is reported"
            tried[spec.learning_rate] = outcome["validation"]["answers"]["accuracy"]
    assert len(tried) == 2
    assert tried[chosen] == max(tried.values())


def exam_run(seed: int, right: int, *, steps: int = 10, role: Any = "judged", **more: Any) -> RunResult:
    answers = Answers((right, 4 - right), (2, 2)) if right == 2 else Answers((right, 0), (2, 2))
    scores = ExamScores(answers, answers if role == "judged" else None, steps)
    return RunResult("a", 1e-3, seed, role, lesson="x", **{"exam": scores, **more})


def test_what_rates_are_chosen_by() -> None:
    """Answers first, then whole sequences, then fewer steps: the lowest score is the best."""
    ranked = [exam_run(0, 2), exam_run(0, 1, steps=5), exam_run(0, 1), exam_run(0, 0)]
    scores = [run.tuning_score for run in ranked]
    assert scores == sorted(scores)
    assert len(set(scores)) == 4
    assert exam_run(0, 0, exam=None, failure=Failure("diverged", "nan")).tuning_score is None


def test_how_an_arm_is_shown() -> None:
    diverged = exam_run(2, 0, exam=None, failure=Failure("diverged", "nan"))
    killed = exam_run(3, 0, exam=None, failure=Failure("killed", "signal 9"))

    def shown(*runs: RunResult, rate: float | None = 2e-3) -> str:
        return exam_cell(ExamArm("a", 100, rate, (1e-3, 2e-3, 4e-3), runs))

    assert shown(exam_run(1, 1)) == "25.0"
    assert shown(exam_run(1, 1), diverged) == "12.5 (0.0–25.0)"
    assert shown(exam_run(1, 1), killed) == "25.0", "nothing is known of it"
    assert shown(exam_run(1, 1), rate=4e-3) == "25.0*"
    assert shown(killed) == "no run finished"
    assert shown(exam_run(0, 1, role="tuning"), rate=None) == "no run finished"
