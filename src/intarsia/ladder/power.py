"""What a comparison with so many seeds can find."""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.ladder.plan import Plan
from intarsia.ladder.scatter import PooledScatter
from intarsia.ladder.student import detectable


@dataclass(frozen=True)
class Power:
    """What a comparison like this one can find."""

    run_noise: float
    """Standard deviation of one run's bits per byte, what its seed does to all arms left out."""
    degrees: int
    """Of freedom that it was estimated with."""
    pooled: bool
    """Whether all arms' runs speak for each pair; False where they scatter unlike each other."""
    detectable: float
    """The true difference that this many seeds find in 80 % of all cases, documents left out."""


def power_of(plan: Plan, scatter: PooledScatter | None, comparisons: int, confidence: float) -> Power | None:
    """What the plan's seeds can find with the noise that was seen."""
    seeds = len(plan.seeds)
    if scatter is None or scatter.variance == 0 or seeds < 2:
        return None
    degrees = scatter.degrees if scatter.equal else seeds - 1
    spent = 1 - (1 - confidence) / max(comparisons, 1)
    noise = scatter.of_pairs.variance**0.5
    return Power(
        run_noise=scatter.variance**0.5,
        degrees=scatter.degrees,
        pooled=scatter.equal,
        detectable=detectable(noise, seeds, degrees, spent),
    )
