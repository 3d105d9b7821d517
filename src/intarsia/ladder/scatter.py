"""How much runs scatter that differ by their seed alone, from all arms together.

The model: the bits per byte of arm `a` with seed `s` are `level[a] + seed[s] + noise[a, s]`, with one variance of the
noise for all arms. What a seed does to all arms (the order of the data) falls out of their differences; what is left
is estimated from the residuals of all arms and seeds at once, with `(arms - 1) * (seeds - 1)` degrees of freedom
where no run is missing, in place of the `seeds - 1` that a pair alone has. It is the residual variance of the mixed
model with arms fixed and seeds random, which for pairs of arms is that of two-way analysis of variance (Scheffe 1959,
chapter 8). Why this one: two seeds give a pair alone one degree of freedom, which is hardly a variance at all, and
architectures of one size trained by one recipe scatter alike far more than a variance of two numbers does.

Where they do not, one number for all would be wrong for some pairs. So it is tested: if the most and the least
scattered pair are further apart than in all but 1 % of cases with equal noise, each pair goes by its own runs again.
With few seeds that test sees only large differences; what smaller ones do, `benchmarks/verdicts.py` measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from intarsia.ladder.student import Array

Table = Mapping[str, Mapping[int, float]]
"""Bits per byte of each arm with each seed; runs may be missing."""

_SIMULATED, _RARE = 4000, 0.01


@dataclass(frozen=True)
class Scatter:
    """The variance of one seed's value, as it was estimated."""

    variance: float
    degrees: int
    pooled: bool = False
    """From all arms, and not from the values alone that it speaks of."""


def own_scatter(values: Array) -> Scatter:
    """From the values of one quantity, at least two: one for each seed."""
    return Scatter(float(values.var(ddof=1)), len(values) - 1)


@dataclass(frozen=True)
class PooledScatter:
    """The noise of one run, from all arms."""

    variance: float
    """Of one run of one arm, in (bits per byte)^2."""
    degrees: int
    equal: bool
    """Whether the arms scatter alike, as far as can be seen."""

    @property
    def of_pairs(self) -> Scatter:
        """Of the difference of two arms with one seed."""
        return Scatter(2 * self.variance, self.degrees, pooled=True)


def pool_scatter(table: Table, pairs: Sequence[tuple[str, str]]) -> PooledScatter | None:
    """The noise of one run, from all that finished.

    Args:
        table: at least two arms with a run.
        pairs: the arms that are compared; each must have a seed in common.

    Returns:
        None where it cannot be known: with one seed, or where no two seeds have two arms in common.
    """
    cells = [(arm, seed) for arm, runs in table.items() for seed in runs]
    arms = {arm: column for column, arm in enumerate(table)}
    seeds = {seed: column for column, seed in enumerate(sorted({seed for _, seed in cells}), len(arms))}
    design = np.zeros((len(cells), len(arms) + len(seeds)))
    for row, (arm, seed) in enumerate(cells):
        design[row, [arms[arm], seeds[seed]]] = 1
    # What the levels of arms and seeds leave over.
    projector = np.eye(len(cells)) - design @ np.linalg.pinv(design)
    degrees = len(cells) - int(np.linalg.matrix_rank(design))
    if degrees < 1:
        return None
    place = {cell: row for row, cell in enumerate(cells)}
    shared = [sorted(table[a].keys() & table[b].keys()) for a, b in pairs]
    rows = [
        ([place[a, seed] for seed in both], [place[b, seed] for seed in both])
        for (a, b), both in zip(pairs, shared, strict=True)
        if len(both) > 1
    ]

    def unlikeness(values: Array) -> Array:
        """The largest variance of a pair's differences in terms of the smallest; values [draws, cells]."""
        own = [np.var(values[:, one] - values[:, two], axis=1, ddof=1) for one, two in rows]
        return np.asarray(np.max(own, axis=0) / np.maximum(np.min(own, axis=0), np.finfo(float).tiny))

    values = np.array([[table[arm][seed] for arm, seed in cells]])
    # Levels far above their differences would cost digits.
    values = values - values.mean()
    variance = float(((values @ projector) ** 2).sum() / degrees)
    equal = True
    if len(rows) > 1 and variance > 0:
        simulated = unlikeness(np.random.default_rng(0).normal(size=(_SIMULATED, len(cells))))
        equal = bool(unlikeness(values)[0] <= np.quantile(simulated, 1 - _RARE))
    return PooledScatter(variance, degrees, equal)
