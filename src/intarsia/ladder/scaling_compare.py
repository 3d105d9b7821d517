"""Two architectures by their scaling laws: how much compute one saves, and where the curves cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from intarsia.errors import ConfigError
from intarsia.ladder.scaling_law import ScalingFit, ScalingLaw

_STEPS = 200
"""Places at which a crossing is looked for, before it is made exact."""


@dataclass(frozen=True)
class Multiplier:
    """At a compute: how many times that compute the baseline needs for the same loss, both spending it well.

    Above 1 the arm saves compute. Infinite where the baseline cannot reach the loss with any."""

    compute: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Crossing:
    """Where the curves of two arms cross, within what was measured."""

    compute: float | None
    """None: not within what was measured."""
    low: float | None
    high: float | None
    share: float
    """Of the resampled laws whose curves cross there."""

    @property
    def sentence(self) -> str:
        if self.compute is None:
            often = f" (in {self.share:.0%} of the resampled laws they do)" if self.share else ""
            return f"The curves do not cross within what was measured{often}."
        return (
            f"The curves cross at {self.compute:.2g} FLOPs [{self.low:.2g}, {self.high:.2g}] "
            f"in {self.share:.0%} of the resampled laws."
        )


def measured_compute(fits: Sequence[ScalingFit], flops: float = 6.0) -> tuple[float, float]:
    """The least and the most compute that was spent on a run of each of the arms.

    Raises:
        ConfigError: no compute was spent on all.
    """
    spent = [[flops * point.parameters * point.tokens for point in fit.points] for fit in fits]
    low, high = max(min(each) for each in spent), min(max(each) for each in spent)
    if not low < high:
        raise ConfigError("the arms were not measured at a common compute: give them the same rungs")
    return low, high


def multiplier(
    arm: ScalingFit, baseline: ScalingFit, compute: float, *, flops: float = 6.0, confidence: float = 0.95
) -> Multiplier:
    """The compute that the baseline needs to match an arm that spent `compute`, as a multiple of it.

    Args:
        flops: of training, for a parameter and a token.
        confidence: of the interval, bootstrapped through both fits in pairs.
    """
    values = [
        _multiplier(one, other, compute, flops)
        for one, other in zip(arm.resampled, baseline.resampled, strict=True)
    ]
    tail = (1 - confidence) / 2
    # Of the values themselves: between two numbers of which one is infinite nothing can be interpolated.
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return Multiplier(compute, _multiplier(arm.law, baseline.law, compute, flops), float(low), float(high))


def _multiplier(arm: ScalingLaw, baseline: ScalingLaw, compute: float, flops: float) -> float:
    wanted = arm.optimal_loss(compute, flops)
    if wanted <= baseline.irreducible:
        return math.inf
    low, high = math.log(compute) - 60, math.log(compute) + 60
    for _ in range(80):
        middle = (low + high) / 2
        if baseline.optimal_loss(math.exp(middle), flops) > wanted:
            low = middle
        else:
            high = middle
    return math.exp(high) / compute


def crossing(
    arm: ScalingFit, baseline: ScalingFit, *, flops: float = 6.0, confidence: float = 0.95
) -> Crossing:
    """Where the two arms' compute-optimal losses are the same, within what was measured of both."""
    low, high = measured_compute([arm, baseline], flops)
    found = [
        place
        for one, other in zip(arm.resampled, baseline.resampled, strict=True)
        if (place := _crossing(one, other, low, high, flops)) is not None
    ]
    place, share = _crossing(arm.law, baseline.law, low, high, flops), len(found) / len(arm.resampled)
    if place is None or not found:
        return Crossing(None, None, None, share)
    tail = (1 - confidence) / 2
    ends = np.quantile(found, [tail, 1 - tail])
    return Crossing(place, float(ends[0]), float(ends[1]), share)


def _crossing(arm: ScalingLaw, baseline: ScalingLaw, low: float, high: float, flops: float) -> float | None:
    def ahead(compute: float) -> float:
        return baseline.optimal_loss(compute, flops) - arm.optimal_loss(compute, flops)

    places = np.geomspace(low, high, _STEPS)
    signs = np.sign([ahead(place) for place in places])
    changes = np.flatnonzero(signs[1:] * signs[:-1] < 0)
    if not len(changes):
        return None
    left, right = places[changes[0]], places[changes[0] + 1]
    for _ in range(40):
        middle = math.sqrt(left * right)
        if np.sign(ahead(middle)) == signs[changes[0]]:
            left = middle
        else:
            right = middle
    return float(math.sqrt(left * right))
