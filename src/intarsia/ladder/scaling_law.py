"""The law `L = E + A / N^alpha + B / D^beta` of a loss in parameters and tokens, fitted with intervals.

For given exponents the law is linear in `E`, `A` and `B`, so that only two of five unknowns are searched for and the
others follow (variable projection, Golub and Pereyra 1973): a search over all five ends in local minima, and parabolas
through runs of equal compute are biased. Residuals are relative to the loss, `(fit - L) / L`, and weighed by Huber's
function, so that a run that went astray moves the fit by little. The search starts at several places of a grid.

Intervals come from the bootstrap *through* the fit: residuals are drawn with replacement, made as large as `n` points
and five unknowns let them be in expectation, added to the fitted losses, and the whole fit is made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from intarsia.errors import ConfigError
from intarsia.ladder.student import Array

UNKNOWNS = 5
_STARTS = tuple((alpha, beta) for alpha in (0.15, 0.35, 0.7, 1.1) for beta in (0.15, 0.35, 0.7, 1.1))
_EXPONENTS = (0.02, 3.0)
"""Between which exponents are looked for."""
_FINEST, _SMALLEST_HUBER = 1e-4, 1e-4


@dataclass(frozen=True)
class Point:
    """A run: parameters, tokens and the loss that came out, in any unit of loss."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """`loss = irreducible + a / parameters**alpha + b / tokens**beta`; a and b are at least 0."""

    irreducible: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, parameters: Array | float, tokens: Array | float) -> Array:
        """The loss of models with these parameters after these tokens."""
        n, d = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        return np.asarray(self.irreducible + self.a * n**-self.alpha + self.b * d**-self.beta)

    def optimal_parameters(self, compute: float, flops: float = 6.0) -> float:
        """The parameters that make most of a compute of `flops * parameters * tokens` (Hoffmann et al. 2022, eq. 4)."""
        balance = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        return float(balance * (compute / flops) ** (self.beta / (self.alpha + self.beta)))

    def optimal_loss(self, compute: float, flops: float = 6.0) -> float:
        """The loss that a compute buys, well spent. Where parameters or tokens do nothing, that is all there is to
        have."""
        if not self.a or not self.b:
            return self.irreducible
        parameters = self.optimal_parameters(compute, flops)
        return float(self.loss(parameters, compute / flops / parameters))


@dataclass(frozen=True)
class ScalingFit:
    """A fitted law, and what the bootstrap made of it."""

    law: ScalingLaw
    resampled: tuple[ScalingLaw, ...]
    points: tuple[Point, ...]
    spread: float
    """Standard deviation of the relative residuals, the unknowns counted."""

    def interval(self, value: Callable[[ScalingLaw], float], confidence: float = 0.95) -> tuple[float, float]:
        """Between what anything that follows from the law lies, by the resampled laws."""
        tail = (1 - confidence) / 2
        low, high = np.quantile([value(law) for law in self.resampled], [tail, 1 - tail])
        return float(low), float(high)


def fit_law(points: Sequence[Point], *, resamples: int = 200, seed: int = 0) -> ScalingFit:
    """Fit the law to runs of one architecture.

    Args:
        points: runs; those of several seeds are points of their own.
        resamples: bootstrap fits.
        seed: of the bootstrap. Fits of arms with the same runs draw the same places, which keeps them paired.

    Raises:
        ConfigError: fewer points than tell five unknowns apart, or fewer than three sizes or three amounts of tokens,
            or values that are not positive.
    """
    n, d, loss = (np.array([getattr(p, name) for p in points]) for name in ("parameters", "tokens", "loss"))
    if len(points) <= UNKNOWNS:
        raise ConfigError(
            f"a scaling law with {UNKNOWNS} unknowns needs at least {UNKNOWNS + 1} runs, got {len(points)}"
        )
    if not all(np.all(np.isfinite(values) & (values > 0)) for values in (n, d, loss)):
        raise ConfigError("parameters, tokens and losses of a scaling law must be finite and above 0")
    for name, values in (("sizes", n), ("amounts of tokens", d)):
        if len(np.unique(values)) < 3:
            raise ConfigError(
                f"an exponent needs at least 3 different {name}, got {len(np.unique(values))}: add a rung"
            )
    law = _fit(n, d, loss[None], _STARTS)[0]
    fitted = law.loss(n, d)
    residuals = (loss / fitted - 1) * math.sqrt(len(points) / (len(points) - UNKNOWNS))
    rng = np.random.default_rng(seed)
    places = rng.integers(len(points), size=(resamples, len(points)))
    resampled = tuple(_fit(n, d, fitted * (1 + residuals[places]), [(law.alpha, law.beta), _STARTS[5]]))
    return ScalingFit(law, resampled, tuple(points), float(np.sqrt((residuals**2).mean())))


def _fit(n: Array, d: Array, losses: Array, starts: Sequence[tuple[float, float]]) -> list[ScalingLaw]:
    """The law of each row of `losses` [rows, points]: of all starts, the lowest end. All are fitted at once."""
    # About 1 in the middle of what was measured, so that the three columns are alike in size.
    n_unit, d_unit = (float(np.exp(np.log(values).mean())) for values in (n, d))
    sizes, amounts = np.log(n / n_unit), np.log(d / d_unit)
    rows, tries = len(losses), len(starts)

    def project(places: Array) -> tuple[Array, Array]:
        """Costs and solutions at places [rows * tries, near, 2]."""
        powers = [np.exp(-places[..., :1] * sizes), np.exp(-places[..., 1:] * amounts)]
        columns = np.stack([np.ones_like(powers[0]), *powers], axis=-1)
        scaled = columns / np.repeat(losses, tries, axis=0)[:, None, :, None]
        costs, solutions = _project(scaled.reshape(-1, *scaled.shape[2:]))
        return costs.reshape(places.shape[:2]), solutions.reshape(*places.shape[:2], 3)

    ends = _search(lambda places: project(places)[0], np.tile(np.array(starts), (rows, 1)))
    costs, solutions = project(ends[:, None])
    best = costs[:, 0].reshape(rows, tries).argmin(axis=1) + np.arange(rows) * tries
    return [
        ScalingLaw(
            irreducible=float(e),
            a=float(a * n_unit**alpha),
            alpha=float(alpha),
            b=float(b * d_unit**beta),
            beta=float(beta),
        )
        for (alpha, beta), (e, a, b) in zip(ends[best], solutions[best, 0], strict=True)
    ]


def _search(costs: Callable[[Array], Array], places: Array) -> Array:
    """The lowest place near each of `places` [searches, 2], by steps along the axes and diagonals, which are halved
    where none leads down."""
    moves = np.array([move for move in product((-1, 0, 1), repeat=2) if move != (0, 0)])
    best, step = costs(places[:, None])[:, 0], np.full(len(places), 0.2)
    everyone = np.arange(len(places))
    while np.any(step > _FINEST):
        near = np.clip(places[:, None] + step[:, None, None] * moves, *_EXPONENTS)
        found = costs(near)
        lowest = found.argmin(axis=1)
        better = found[everyone, lowest] < best
        places = np.where(better[:, None], near[everyone, lowest], places)
        best = np.where(better, found[everyone, lowest], best)
        step = np.where(better, step, step / 2)
    return places


def _project(columns: Array) -> tuple[Array, Array]:
    """The least Huber cost of `columns @ x = 1` with x at least 0, and x, for each of [problems, points, 3].

    Beyond three times their median size residuals count as outliers: the scale is that of the plain least squares
    solution. Reweighted least squares of Huber's function settles in a few rounds.
    """
    weights = np.ones(columns.shape[:2])
    solutions = _non_negative(columns, weights)
    residuals = np.abs((columns @ solutions[..., None])[..., 0] - 1)
    delta = np.maximum(3 * np.median(residuals, axis=1), _SMALLEST_HUBER)[:, None]
    for _ in range(6):
        weights = np.minimum(1.0, delta / np.maximum(residuals, 1e-300))
        outlying = (weights < 1).any(axis=1)
        if not outlying.any():
            break
        solutions[outlying] = _non_negative(columns[outlying], weights[outlying])
        residuals = np.abs((columns @ solutions[..., None])[..., 0] - 1)
    inner = np.minimum(residuals, delta)
    return (inner * (residuals - inner / 2)).sum(axis=1), solutions


def _non_negative(columns: Array, weights: Array) -> Array:
    """Weighted least squares with unknowns that are at least 0, by the normal equations of each problem.

    Of three unknowns all sets that may be 0 can be tried. Nothing is below the unconstrained solution where that is
    allowed, which is nearly always.
    """
    weighed = columns * weights[..., None]
    gram, right = weighed.transpose(0, 2, 1) @ columns, weighed.sum(axis=1)
    # What rounding leaves of columns that are alike must not decide.
    gram = gram + 1e-13 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(3)
    solutions = np.linalg.solve(gram, right[..., None])[..., 0]
    open_ = np.flatnonzero((solutions < 0).any(axis=1))
    gram, right = gram[open_], right[open_]
    least, best = np.full(len(open_), np.inf), np.zeros((len(open_), 3))
    for kept in ([0, 1], [0, 2], [1, 2], [0], [1], [2]):
        part = np.linalg.solve(gram[:, kept][:, :, kept], right[:, kept, None])[..., 0]
        # The sum of squares, but for a constant.
        rest = np.where((part >= 0).all(axis=1), -(part * right[:, kept]).sum(axis=1), np.inf)
        better = rest < least
        least[better] = rest[better]
        found = np.zeros((len(open_), 3))
        found[:, kept] = part
        best[better] = found[better]
    solutions[open_] = best
    return solutions
