"""Scaling laws that generated the numbers are found again, with intervals that hold them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from intarsia.errors import ConfigError
from intarsia.files import write_json
from intarsia.ladder.record import record_of
from intarsia.ladder.scaling_compare import crossing, measured_compute, multiplier
from intarsia.ladder.scaling_law import Point, ScalingLaw, fit_law
from intarsia.ladder.scaling_points import points_of
from intarsia.ladder.verdict import judge
from support.comparison import make_plan, make_results

# Hoffmann et al. 2022, appendix D.3, as Besiroglu et al. 2024 (2404.10102) fitted it again.
LAW = ScalingLaw(irreducible=1.82, a=482.0, alpha=0.3478, b=2085.4, beta=0.3658)
SIZES, AMOUNTS = (1e6, 4e6, 1.6e7, 6.4e7), (1e8, 4e8, 1.6e9, 6.4e9)


def runs(law: ScalingLaw, noise: float = 0.0, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [Point(n, d, float(law.loss(n, d)) * (1 + noise * rng.normal())) for n in SIZES for d in AMOUNTS]


@pytest.mark.parametrize(
    "law", [LAW, ScalingLaw(0.6, 30.0, 0.2, 5000.0, 0.5), ScalingLaw(0.0, 30.0, 0.25, 900.0, 0.4)]
)
def test_an_exact_law_is_found(law: ScalingLaw) -> None:
    found = fit_law(runs(law), resamples=1).law
    assert found.alpha == pytest.approx(law.alpha, rel=5e-3)
    assert found.beta == pytest.approx(law.beta, rel=5e-3)
    assert found.irreducible == pytest.approx(law.irreducible, abs=5e-3)
    compute = 6 * SIZES[2] * AMOUNTS[2]
    assert found.optimal_loss(compute) == pytest.approx(law.optimal_loss(compute), rel=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    compute, trials = 6 * SIZES[-1] * AMOUNTS[-1], 60
    held = np.zeros(2)
    for trial in range(trials):
        fit = fit_law(runs(LAW, 2e-3, seed=trial), resamples=100, seed=trial)
        for index, value in enumerate((lambda law: law.optimal_loss(compute), lambda law: law.alpha)):
            low, high = fit.interval(value)
            held[index] += low <= value(LAW) <= high
    # Sixteen points and five unknowns: the bootstrap's quantiles come a little short of 95 %; by chance the share of 60
    # falls four standard errors, 11 %, below.
    assert np.all(held / trials > 0.8)


def test_a_run_that_went_astray_moves_little() -> None:
    points = runs(LAW, 1e-3)
    astray = [*points[:5], replace(points[5], loss=points[5].loss * 1.3), *points[6:]]
    compute = 6 * SIZES[-1] * AMOUNTS[-1]
    found = fit_law(astray, resamples=1).law.optimal_loss(compute)
    assert found == pytest.approx(LAW.optimal_loss(compute), rel=0.01)


def test_compute_is_divided_as_the_law_says() -> None:
    compute = 1e18
    best = LAW.optimal_parameters(compute)
    losses = [float(LAW.loss(n, compute / 6 / n)) for n in best * np.geomspace(0.5, 2, 41)]
    assert int(np.argmin(losses)) == 20


def test_an_arm_that_saves_half_the_compute() -> None:
    """With a scaled by 2**-alpha and b by 2**-beta an arm does at once what the other does with twice both."""
    half = replace(LAW, a=LAW.a * 2**-LAW.alpha, b=LAW.b * 2**-LAW.beta)
    one, other = (fit_law(runs(law, 1e-3, seed=3), resamples=100, seed=1) for law in (half, LAW))
    low, high = measured_compute([one, other])
    found = multiplier(one, other, math.sqrt(low * high))
    assert found.value == pytest.approx(4, rel=0.1)
    assert found.low < 4 < found.high
    assert crossing(one, other).compute is None
    assert "do not cross within what was measured" in crossing(one, other).sentence
    assert multiplier(replace(one, law=replace(half, irreducible=0.0)), other, 1e25).value == math.inf


def test_curves_that_cross() -> None:
    """An arm that starts behind and falls faster passes the other at a known place."""
    steep = replace(LAW, a=LAW.a * 1.9, alpha=LAW.alpha + 0.04)
    fits = [fit_law(runs(law, 2e-4), resamples=60) for law in (steep, LAW)]
    found = crossing(*fits)
    true = crossing(*[replace(fit, law=law) for fit, law in zip(fits, (steep, LAW), strict=True)])
    assert true.compute is not None
    assert found.compute == pytest.approx(true.compute, rel=0.05)
    assert found.low <= found.compute <= found.high < 1.1 * found.low
    assert found.share > 0.9


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (runs(LAW)[:5], "at least 6 runs"),
        ([replace(point, parameters=1e6) for point in runs(LAW)], "at least 3 different sizes, got 1"),
        ([replace(point, tokens=1e6) for point in runs(LAW)], "at least 3 different amounts of tokens"),
        ([*runs(LAW), Point(1e6, 1e8, math.nan)], "finite and above 0"),
    ],
)
def test_what_cannot_be_fitted_is_said(points: list[Point], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_law(points)


def test_points_come_from_verdicts_on_the_same_text(tmp_path: Path) -> None:
    paths = []
    for index in range(3):
        plan = make_plan()
        results = make_results(plan, seed=0)
        results = replace(
            results, arms=tuple(replace(arm, tokens=1000 * (index + 1)) for arm in results.arms)
        )
        paths.append(tmp_path / f"{index}.json")
        write_json(paths[-1], {**judge(plan, results).to_dict(), **record_of(plan, results, tmp_path)})
    points = points_of("full", paths)
    assert [point.tokens for point in points] == [1000] * 3 + [2000] * 3 + [3000] * 3
    assert {point.parameters for point in points} == {1_111_296}
    assert all(1.5 < point.loss < 2.5 for point in points)
    with pytest.raises(ConfigError, match="has no arm 'fall': full, gdn-hybrid, kimi-linear"):
        points_of("fall", paths)
    with pytest.raises(ConfigError, match="run the comparison first"):
        points_of("full", [tmp_path / "none.json"])
    plan = make_plan(evaluation=replace(make_plan().evaluation, documents=90))
    results = make_results(plan)
    write_json(
        tmp_path / "other.json", {**judge(plan, results).to_dict(), **record_of(plan, results, tmp_path)}
    )
    with pytest.raises(ConfigError, match="judged by other documents"):
        points_of("full", [*paths, tmp_path / "other.json"])


def test_arms_without_a_common_compute_are_not_compared() -> None:
    fit = fit_law(runs(LAW), resamples=1)
    far = fit_law([replace(p, parameters=p.parameters * 1e6) for p in runs(LAW)], resamples=1)
    with pytest.raises(ConfigError, match="give them the same rungs"):
        measured_compute([fit, far])
