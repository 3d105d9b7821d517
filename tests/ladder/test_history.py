"""Verdicts are kept, runs that are left out are named, and who looks often pays for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from intarsia.files import write_json
from intarsia.ladder.history import History, not_counted, spending
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_file import load_plan
from intarsia.ladder.record import record_of
from intarsia.ladder.results import Results
from intarsia.ladder.verdict import Verdict, judge
from ladder.test_run_folder import SPEC
from support.comparison import make_plan, make_results


def conclude(directory: Path, plan: Plan, results: Results | None = None) -> tuple[Verdict, History]:
    """As `compare` does it when all runs are made."""
    results = results or make_results(plan)
    history = History.of(directory, plan, results)
    verdict = judge(plan, results, confidence=history.confidence(plan), notes=history.notes(plan, []))
    record = {**record_of(plan, results, directory / "report.html"), **history.record([])}
    verdict = dataclasses.replace(verdict, record=record)
    history.keep(plan, verdict.to_dict())
    write_json(directory / "verdict.json", verdict.to_dict())
    return verdict, history


def test_a_second_verdict_tells_of_the_first_and_both_are_kept(tmp_path: Path) -> None:
    first, _ = conclude(tmp_path, make_plan(seeds=(1, 2)))
    assert len(first.notes) == 1, "the judged context alone"
    second, history = conclude(tmp_path, make_plan(seeds=(2, 3)))
    assert history.number == 2
    assert any(f"of seeds 1 and 2, said: “{first.sentence}”" in note for note in second.notes)
    assert any("more than 0.05" in note for note in second.notes)
    assert second.record["history"][0]["seeds"] == (1, 2)
    for number, seeds in ((1, (1, 2)), (2, (2, 3))):
        kept = tmp_path / "history" / f"{number:03}"
        assert load_plan(kept / "plan.toml").seeds == seeds
    assert (
        json.loads((tmp_path / "history" / "001" / "verdict.json").read_text())["sentence"] == first.sentence
    )


def test_the_same_again_is_no_new_verdict(tmp_path: Path) -> None:
    plan = make_plan()
    first, _ = conclude(tmp_path, plan)
    again, history = conclude(tmp_path, plan)
    assert (again.notes, history.number) == (first.notes, 1)
    assert len(list((tmp_path / "history").iterdir())) == 1


def test_a_directory_from_before_there_was_a_history(tmp_path: Path) -> None:
    plan = make_plan(seeds=(1, 2))
    results = make_results(plan)
    verdict = judge(plan, results)
    old = {**verdict.to_dict(), **record_of(plan, results, tmp_path / "report.html")}
    write_json(tmp_path / "verdict.json", old)
    later, history = conclude(tmp_path, make_plan(seeds=(2, 3)))
    assert history.number == 2
    assert any(verdict.sentence in note for note in later.notes)


def test_looks_spend_what_is_allowed_and_no_more(tmp_path: Path) -> None:
    assert sum(spending(look) for look in range(1, 10_000)) == pytest.approx(1, abs=1e-3)
    options = dataclasses.replace(make_plan().evaluation, sequential=True)
    widths = []
    for number, seeds in enumerate([(1, 2), (1, 2, 3), (1, 2, 3, 4)], 1):
        verdict, _ = conclude(tmp_path, make_plan(seeds=seeds, evaluation=options))
        assert verdict.confidence == pytest.approx(1 - 0.05 / (number * (number + 1)))
        assert any(f"look {number} may err" in note for note in verdict.notes)
        widths.append(verdict.pairs[0].difference.simultaneous.confidence)
    assert widths == pytest.approx([1 - 0.05 / k / (k + 1) / 3 for k in (1, 2, 3)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 9}, "the plan has not this seed"),
        ({"arm": "other"}, "the plan has no such arm"),
        ({"learning_rate": 0.5}, "another rate, 0.5"),
        ({}, "other data, options, code or libraries"),
    ],
)
def test_finished_runs_that_are_left_out_are_named(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    plan = make_plan()
    results = make_results(plan)
    base = {"arm": "full", "learning_rate": results.arm("full").learning_rate}
    spec = dataclasses.replace(SPEC, **{**base, **changes})
    place = tmp_path / spec.directory_name
    write_json(place / "spec.json", spec.to_dict())
    assert not_counted(tmp_path, plan, results) == [], "it is not finished"
    write_json(place / "outcome.json", {})
    (found,) = not_counted(tmp_path, plan, results)
    assert (found.arm, found.seed, found.reason) == (spec.arm, spec.seed, reason)
    (note,) = History.of(tmp_path / "new", plan, results).notes(plan, [found])
    assert f"{spec.arm} seed {spec.seed} ({reason})" in note
