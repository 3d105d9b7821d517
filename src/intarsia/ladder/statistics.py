"""Estimates with intervals over evaluation documents and training seeds.

What is estimated. A model's held-out bits per byte is a ratio: the bits of all documents divided by their
bytes. An arm's figure is the mean of that ratio over its seeds; the difference of two arms is the mean over
the seeds that both have, paired: the same seed gives both the same batches in the same order, and both are
judged on the same documents.

What is uncertain. Two things were drawn at random: the documents, out of all documents like them, and the
seeds, out of all seeds. They are crossed (each seed's model reads each document), so neither can be ignored
and they must not be pooled into one sample. With `S` seeds and `D` documents the variance of the estimate is

    var_seed / S  +  var_document / D  +  var_interaction / (S D).

How the interval is made. Each of `resamples` draws is

    (ratio over documents drawn with replacement, of the series averaged over seeds)
        + sqrt(V / S) * t,      V = sample variance of the seeds' own ratios,  t ~ Student with S - 1 d.o.f.

and the interval runs between the draws' quantiles. Documents are many, so the plain bootstrap serves. Seeds
are few: drawing two, three or four of them with replacement makes an interval that is far too narrow (with
three seeds a nominal 95 % covers about 75 %: `tests/ladder/test_statistics.py` shows it), because it has too
few distinct draws and its variance is short of a factor `(S - 1) / S`. Drawing the seeds' part from Student's
distribution is the parametric bootstrap of a normal mean; with documents fixed it gives exactly the classical
t-interval. The interaction is counted in both parts, so the interval is a little too wide when it dominates,
never too narrow.

What it assumes: seeds' effects are about normal (three seeds cannot tell), documents are independent draws
(files of one project are not quite), and the plan was not chosen by looking at the judged documents.
With one seed there is no second part: the interval then speaks of documents alone, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from intarsia.errors import ConfigError

Array = npt.NDArray[np.float64]

#: Rows of document weights drawn at a time, to bound the memory: chunk * documents * 8 bytes.
_CHUNK_ELEMENTS = 2_000_000


@dataclass(frozen=True)
class Interval:
    """An interval `[low, high]` at a confidence, both in the unit of what was estimated."""

    low: float
    high: float
    confidence: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Estimate:
    """A ratio, in bits per byte, with its uncertainty.

    `interval` is at the nominal confidence on its own; `simultaneous` is wider, so that all the intervals of
    one family cover together at the nominal confidence (Bonferroni).
    """

    value: float
    interval: Interval
    simultaneous: Interval
    standard_error: float
    per_seed: tuple[float, ...]
    documents: int

    @property
    def seeds(self) -> int:
        return len(self.per_seed)

    @property
    def covers_seeds(self) -> bool:
        """Whether the interval speaks of other seeds too; with one seed it cannot."""
        return self.seeds > 1


def ratio(bits: Array, text_bytes: Array) -> Array:
    """Bits per byte of each row of `bits` [..., D], given the documents' bytes [D]."""
    return np.asarray(bits.sum(axis=-1) / text_bytes.sum(), dtype=np.float64)


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


def resample_documents(series: Array, text_bytes: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Ratios over documents drawn with replacement.

    Args:
        series: bits [K, D], one row for each thing that is estimated; all rows see the same draws.
        text_bytes: bytes of the documents [D].

    Returns:
        [resamples, K]
    """
    documents = text_bytes.shape[0]
    draws = np.empty((resamples, series.shape[0]))
    chunk = max(1, _CHUNK_ELEMENTS // documents)
    share = np.full(documents, 1 / documents)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        weights = rng.multinomial(documents, share, size=size).astype(np.float64)
        draws[start : start + size] = (weights @ series.T) / (weights @ text_bytes)[:, None]
    return draws


def estimate(
    series: Sequence[Array],
    text_bytes: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    comparisons: int = 1,
    resamples: int = 20_000,
    seed: int = 0,
) -> list[Estimate]:
    """Estimate bits per byte, or differences of it, with intervals over documents and seeds.

    Args:
        series: one array [S, D] for each quantity: bits of each document under each seed (for a difference,
            the difference of bits). The number of seeds may differ between quantities; the documents may not.
        text_bytes: bytes of the documents [D], all positive.
        confidence: nominal confidence, as 0.95.
        comparisons: size of the family for the simultaneous intervals.
        resamples: bootstrap draws.
        seed: of the bootstrap's own generator. The same numbers in give the same intervals out.

    Raises:
        ConfigError: shapes that do not fit, fewer than two documents, values that are not finite.
    """
    sizes = np.asarray(text_bytes, dtype=np.float64)
    if sizes.ndim != 1 or sizes.shape[0] < 2:
        raise ConfigError("intervals over documents need at least two evaluation documents")
    if not np.all(sizes > 0):
        raise ConfigError("every evaluation document must have at least one byte")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be between 0 and 1, got {confidence}")
    if comparisons < 1 or resamples < 100:
        raise ConfigError("comparisons must be at least 1 and resamples at least 100")
    for bits in series:
        if bits.ndim != 2 or bits.shape[0] < 1 or bits.shape[1] != sizes.shape[0]:
            raise ConfigError(f"expected bits of shape [seeds, {sizes.shape[0]}], got {list(bits.shape)}")
        if not np.all(np.isfinite(bits)):
            raise ConfigError("bits of some document are not finite: such a run must be counted as failed")
    if not series:
        return []
    rng = np.random.default_rng(seed)
    means = np.stack([bits.mean(axis=0) for bits in series])
    by_documents = resample_documents(means, sizes, resamples, rng)
    # Stratified draws of Student's t: one in each of `resamples` equal slices, in random order. Plain draws
    # would leave the far quantiles, which small families of seeds need, to a handful of extreme values.
    slices = (np.arange(resamples) + 0.5) / resamples
    estimates = []
    for column, bits in enumerate(series):
        seeds = bits.shape[0]
        per_seed = ratio(bits, sizes)
        draws = by_documents[:, column]
        variance = float(draws.var(ddof=1))
        if seeds > 1:
            seed_error = float(np.sqrt(per_seed.var(ddof=1) / seeds))
            draws = draws + seed_error * rng.permutation(student_t_quantile(slices, seeds - 1))
            variance += seed_error**2
        value = float(per_seed.mean())
        estimates.append(
            Estimate(
                value=value,
                interval=_interval(draws, confidence),
                simultaneous=_interval(draws, 1 - (1 - confidence) / comparisons),
                standard_error=float(np.sqrt(variance)),
                per_seed=tuple(float(x) for x in per_seed),
                documents=int(sizes.shape[0]),
            )
        )
    return estimates


def _interval(draws: Array, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high), confidence)
