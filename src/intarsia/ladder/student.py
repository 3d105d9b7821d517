"""Student's distribution: its quantiles, and how often a test that goes by it finds a difference."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from intarsia.errors import ConfigError

Array = npt.NDArray[np.float64]


def student_t_quantile(probability: npt.ArrayLike, degrees: int) -> Array:
    """The quantile of Student's distribution for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4).

    Exact to float64 by bisection on the closed form; NumPy has no quantile function and SciPy is not needed
    for this alone.
    """
    if degrees < 1:
        raise ConfigError(f"Student's distribution needs at least one degree of freedom, got {degrees}")
    p = np.asarray(probability, dtype=np.float64)
    if np.any((p <= 0) | (p >= 1)):
        raise ConfigError("a quantile needs probabilities strictly between 0 and 1")
    central = np.abs(2 * p - 1)
    low, high = np.zeros_like(central), np.full_like(central, np.pi / 2)
    for _ in range(60):
        middle = (low + high) / 2
        below = _student_central(middle, degrees) < central
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray(np.sign(p - 0.5) * np.sqrt(degrees) * np.tan((low + high) / 2), dtype=np.float64)


def _student_central(theta: Array, degrees: int) -> Array:
    """P(|t| < sqrt(degrees) tan(theta))."""
    sine, cosine = np.sin(theta), np.cos(theta)
    odd = degrees % 2 == 1
    if degrees == 1:
        return 2 * theta / np.pi
    term = cosine if odd else np.ones_like(cosine)
    total = term.copy()
    for power in range(3 if odd else 2, degrees - 1, 2):
        term = term * cosine**2 * (power - 1) / power
        total += term
    return 2 / np.pi * (theta + sine * total) if odd else sine * total


def power(effect: float, noise: float, seeds: int, degrees: int, confidence: float) -> float:
    """The chance that a two-sided t-interval of a paired difference leaves out zero, on the right side.

    Args:
        effect: the true difference, above 0.
        noise: standard deviation of one seed's difference, in the same unit.
        seeds: whose mean is taken.
        degrees: of freedom that the noise was estimated with.
        confidence: of the interval; of a family of comparisons, that of the simultaneous one.

    Documents count as fixed. The noncentral t-distribution's tail, as an integral of the normal one over the
    estimate of the noise (chi-squared), by the midpoint rule.
    """
    critical = float(student_t_quantile(1 - (1 - confidence) / 2, degrees))
    shift = effect / (noise / math.sqrt(seeds))
    # The square root of chi-squared over its degrees, where it has all but 1e-12 of its mass.
    top = 1 + 8 / math.sqrt(2 * degrees)
    width = top / 4000
    scale = (np.arange(4000) + 0.5) * width
    log_density = (degrees - 1) * np.log(scale) - degrees * scale**2 / 2
    density = np.exp(log_density - log_density.max())
    tail = np.array([math.erfc((critical * x - shift) / math.sqrt(2)) / 2 for x in scale])
    return float((density * tail).sum() / density.sum())


def detectable(noise: float, seeds: int, degrees: int, confidence: float, chance: float = 0.8) -> float:
    """The true difference that `power` finds with this chance, in the unit of the noise."""
    low, high = 0.0, noise
    while power(high, noise, seeds, degrees, confidence) < chance:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        if power(middle, noise, seeds, degrees, confidence) < chance:
            low = middle
        else:
            high = middle
    return (low + high) / 2
