"""Who climbs, decided on simulated results with known truth; and what all rungs show together."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from intarsia.ladder.gates import decide, keep_decisions
from intarsia.ladder.ladder_record import record_of_ladder
from intarsia.ladder.ladder_results import Ascent, RungResult
from intarsia.ladder.record import jsonable
from intarsia.ladder.report.ladder_page import render_ladder
from intarsia.ladder.results import Failure
from intarsia.ladder.rungs import Gates, LadderPlan
from intarsia.ladder.scaling_law import ScalingLaw
from intarsia.ladder.verdict import judge
from support.comparison import make_plan, make_results

LEVELS = {"full": 1.90, "gdn-hybrid": 1.93, "kimi-linear": 1.90}


@pytest.mark.parametrize(
    ("gates", "climbs", "words"),
    [
        (Gates(margin=0.02), False, "shown to be worse by more than the margin of 0.02"),
        (Gates(margin=0.05), True, "not shown to be worse by more than the margin of 0.05"),
        (Gates(margin=0.05, strict=True), True, "shown to be within the margin of 0.05"),
        (Gates(margin=0.03, strict=True), False, "not shown to be within the margin of 0.03"),
    ],
)
def test_an_arm_is_held_against_the_baseline(gates: Gates, climbs: bool, words: str) -> None:
    plan = make_plan()
    results = make_results(plan, LEVELS, seed_noise=1e-4, document_noise=1e-3)
    decisions = {d.arm: d for d in decide(results, judge(plan, results), gates, "full")}
    assert decisions["full"].climbs
    worse = decisions["gdn-hybrid"]
    assert worse.climbs is climbs
    assert f": {words}." in worse.reason
    assert worse.difference == pytest.approx(0.03, abs=2e-3)
    assert worse.low < worse.difference < worse.high


@pytest.mark.parametrize(("baseline", "word"), [("full", "worse"), ("gdn-hybrid", "better")])
def test_an_interval_is_told_the_way_its_sentence_goes(baseline: str, word: str) -> None:
    plan = make_plan()
    results = make_results(plan, LEVELS, seed_noise=2e-3, document_noise=1e-3)
    decisions = {d.arm: d for d in decide(results, judge(plan, results), Gates(margin=0.05), baseline)}
    told = decisions["gdn-hybrid" if baseline == "full" else "full"].reason
    found = re.search(rf"is (0\.\d+) bits per byte {word} than {baseline} \[(0\.\d+), (0\.\d+)\]", told)
    assert found, told
    value, low, high = map(float, found.groups())
    assert low < value < high


def test_an_arm_without_runs_stops_and_so_does_all_without_the_baseline() -> None:
    plan = make_plan()
    failed = {("full", seed): Failure("diverged", "") for seed in plan.seeds}
    results = make_results(plan, LEVELS, failed=failed)
    decisions = {d.arm: d for d in decide(results, judge(plan, results), Gates(), "full")}
    assert not decisions["full"].climbs
    decisions = {d.arm: d for d in decide(results, judge(plan, results), Gates(), "kimi-linear")}
    assert decisions["kimi-linear"].climbs
    assert decisions["full"].reason == "It finished no run."


def test_arms_that_are_as_good_are_seldom_stopped() -> None:
    """At the edge of the margin no more often than the plan allows errors."""
    plan = make_plan(seeds=(1, 2, 3))
    stopped, trials = 0, 60
    for trial in range(trials):
        results = make_results(plan, {**LEVELS, "gdn-hybrid": 1.92}, seed=trial)
        decisions = {d.arm: d for d in decide(results, judge(plan, results), Gates(margin=0.02), "full")}
        stopped += not decisions["gdn-hybrid"].climbs
    # One side of intervals at 95 % over three pairs: less than 1 % of 60; four are far beyond chance.
    assert stopped < 4


def test_decisions_that_change_stay_on_record(tmp_path: Path) -> None:
    plan = make_plan()
    results = make_results(plan, LEVELS, seed_noise=1e-4, document_noise=1e-3)
    for margin in (0.05, 0.02, 0.02):
        gates = Gates(margin=margin)
        keep_decisions(tmp_path, "s", gates, "full", decide(results, judge(plan, results), gates, "full"))
    found = json.loads((tmp_path / "gates.json").read_text())
    assert found["gates"]["margin"] == 0.02
    assert [each["gates"]["margin"] for each in found["before"]] == [0.05]


SIZES, AMOUNTS = (1e6, 4e6, 1.6e7), (1_000_000, 4_000_000, 16_000_000)
LAW = ScalingLaw(irreducible=0.6, a=30.0, alpha=0.3, b=300.0, beta=0.4)


@pytest.fixture(scope="module")
def ascent(tmp_path_factory: pytest.TempPathFactory) -> Ascent:
    """Three sizes at three budgets. Full attention follows a law; Kimi Linear needs half the compute."""
    plan = make_plan()
    base = plan.to_dict()
    base.pop("budget")
    sizes = [{"name": f"s{i}", "tokens": list(AMOUNTS)} for i in range(3)]
    ladder = LadderPlan.from_dict({**base, "sizes": sizes, "gates": {"margin": 1.0}})
    rungs = []
    for index, rung in enumerate(ladder.rungs):
        size, tokens = SIZES[index // 3], AMOUNTS[index % 3]
        loss = float(LAW.loss(size, tokens))
        # Both terms of the law as with 2**(1/2) times the parameters and the tokens.
        less = float(LAW.loss(size * math.sqrt(2), tokens * math.sqrt(2)))
        levels = {"full": loss, "gdn-hybrid": loss, "kimi-linear": less}
        results = make_results(rung.plan, levels, seed_noise=1e-4, document_noise=1e-4, seed=index)
        # The documents' hardness is common to all rungs only in its mean: it is taken out.
        shift = (
            np.mean([run.bits.sum() for run in results.arm("full").judged.values()])
            / results.text_bytes.sum()
        )
        arms = tuple(
            replace(
                arm,
                non_embedding_parameters=int(size),
                tokens=tokens,
                training_flops_per_token=6.0 * size,
                runs=tuple(
                    replace(run, bits=run.bits + (loss - shift) * results.text_bytes)
                    if run.bits is not None
                    else run
                    for run in arm.runs
                ),
            )
            for arm in results.arms
        )
        results = replace(results, arms=arms)
        verdict = judge(rung.plan, results)
        decisions = decide(results, verdict, ladder.gates, ladder.baseline)
        rungs.append(RungResult(rung, tmp_path_factory.mktemp("rung"), results, verdict, decisions))
    return Ascent.of(ladder, rungs, "", 60.0)


def test_the_compute_that_an_arm_saves_is_found(ascent: Ascent) -> None:
    assert ascent.laws["full"].fit.law.alpha == pytest.approx(LAW.alpha, rel=0.1)
    for one in ascent.against["kimi-linear"].multipliers:
        assert one.value == pytest.approx(2, rel=0.1)
        assert one.low <= 2.05
        assert one.high >= 1.95
    for one in ascent.against["gdn-hybrid"].multipliers:
        assert one.value == pytest.approx(1, rel=0.05)
    assert ascent.against["kimi-linear"].crossing.compute is None
    assert "full needs 2.0" in ascent.sentence or "full needs 1.9" in ascent.sentence


def test_the_record_and_the_report_have_it(ascent: Ascent) -> None:
    record = json.loads(json.dumps(jsonable(record_of_ladder(ascent, Path("report.html")))))
    assert len(record["rungs"]) == 9
    assert len(record["laws"]["full"]["points"]) == 27
    assert record["laws"]["full"]["intervals"]["alpha"][0] < record["laws"]["full"]["alpha"]
    assert len(record["against_baseline"]["kimi-linear"]["multipliers"]) == 7
    assert record["rungs"][0]["arms"][0]["flops"] == 6e12
    page = render_ladder(ascent)
    for heading in (
        "The rungs and their gates",
        "What compute buys",
        "Quality and what it costs",
        "What is kept",
    ):
        assert heading in page
    assert 'class="band arm-2"' in page
    assert "The curves do not cross within what was measured" in page
    assert "nan" not in page.lower().replace("nano", "")
