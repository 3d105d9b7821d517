"""One noise of runs from all arms: what it is worth, and when it may not be used."""

from __future__ import annotations

import math

import numpy as np
import pytest

from intarsia.ladder.rate_choice import choice_loss
from intarsia.ladder.results import ArmResult, RunResult
from intarsia.ladder.scatter import PooledScatter, own_scatter, pool_scatter
from intarsia.ladder.student import detectable, power, student_t_quantile


def pairs(arms: int) -> list[tuple[str, str]]:
    return [(f"a{j}", f"a{i}") for i in range(arms) for j in range(i + 1, arms)]


def table(values: np.ndarray) -> dict[str, dict[int, float]]:
    return {
        f"a{arm}": {seed: float(value) for seed, value in enumerate(row) if math.isfinite(value)}
        for arm, row in enumerate(values)
    }


def test_it_is_the_residual_of_two_way_analysis_of_variance() -> None:
    values = np.random.default_rng(0).normal(size=(4, 3)) + np.array([[1.0], [2.0], [3.0], [4.0]])
    values += np.array([10.0, 20.0, 30.0])
    residual = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    found = pool_scatter(table(values), pairs(4))
    assert found.degrees == 6
    assert found.variance == pytest.approx((residual**2).sum() / 6)
    assert found.of_pairs.variance == pytest.approx(2 * found.variance)


def test_of_two_arms_it_is_the_paired_variance() -> None:
    values = np.random.default_rng(1).normal(size=(2, 5))
    found = pool_scatter(table(values), pairs(2))
    own = own_scatter(values[1] - values[0])
    assert (found.degrees, found.of_pairs.variance) == (own.degrees, pytest.approx(own.variance))


def test_missing_runs_cost_degrees_of_freedom() -> None:
    values = np.random.default_rng(2).normal(size=(3, 3))
    values[1, 2] = np.nan
    assert pool_scatter(table(values), pairs(3)).degrees == 3
    assert pool_scatter(table(values[:, :1]), pairs(3)) is None, "one seed"


def test_unequal_noise_is_seen_and_equal_noise_seldom_taken_for_it() -> None:
    rng = np.random.default_rng(3)

    def share(noise: list[float], seeds: int) -> float:
        scaled = np.array(noise)[:, None]
        return float(
            np.mean(
                [
                    not pool_scatter(table(scaled * rng.normal(size=(3, seeds))), pairs(3)).equal
                    for _ in range(150)
                ]
            )
        )

    assert share([1, 1, 1], 3) < 0.05
    assert share([1, 1, 20], 5) > 0.8


@pytest.mark.parametrize(("seeds", "degrees", "confidence"), [(2, 2, 0.95), (3, 4, 0.983), (5, 4, 0.95)])
def test_power_is_that_of_simulated_t_tests(seeds: int, degrees: int, confidence: float) -> None:
    rng = np.random.default_rng(4)
    effect = 3.0
    mean = rng.normal(effect, 1 / math.sqrt(seeds), 40_000)
    error = np.sqrt(rng.chisquare(degrees, 40_000) / degrees / seeds)
    found = (mean / error > student_t_quantile((1 + confidence) / 2, degrees)).mean()
    # Five standard errors of a share of 40,000.
    assert power(effect, 1.0, seeds, degrees, confidence) == pytest.approx(found, abs=0.0125)


def test_what_is_detectable_is_found_in_four_of_five() -> None:
    for seeds, degrees in ((2, 1), (3, 4), (5, 8)):
        effect = detectable(0.01, seeds, degrees, 0.95)
        assert power(effect, 0.01, seeds, degrees, 0.95) == pytest.approx(0.8, abs=1e-4)


def arm(scores: dict[float, float]) -> ArmResult:
    runs = tuple(
        RunResult("x", rate, 0, "tuning", tuning_bits_per_byte=score) for rate, score in scores.items()
    )
    chosen = min(scores, key=lambda rate: scores[rate])
    return ArmResult("x", "", "", 1, 1, chosen, tuple(scores), runs)


def test_the_loss_by_choosing_is_bounded_as_often_as_is_said() -> None:
    """The true loss by a noisy choice among three rates lies below its 95 % bound in at least that share."""
    rng = np.random.default_rng(5)
    true = np.array([0.01, 0.0, 0.004])
    held = 0
    for _ in range(400):
        scores = true + 0.005 * rng.normal(size=3)
        noise = 0.005**2 * rng.chisquare(4) / 4
        bound = choice_loss(
            arm(dict(zip((1.0, 2.0, 4.0), scores, strict=True))), PooledScatter(noise, 4, True), 0.95
        )
        held += true[scores.argmin()] - true.min() <= bound
    assert held / 400 > 0.92


def test_nothing_is_lost_where_nothing_was_chosen_and_unknown_with_one_seed() -> None:
    assert choice_loss(arm({1.0: 2.0}), PooledScatter(1.0, 2, True), 0.95) == 0
    assert choice_loss(arm({1.0: 2.0, 2.0: 3.0}), None, 0.95) is None
    assert choice_loss(arm({1.0: 2.0, 2.0: 3.0}), PooledScatter(1e-9, 2, True), 0.95) == 0
