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

    (ratio over documents drawn with replacement, of the series averaged over seeds), shrunk towards the estimate
        + sqrt(V / S) * t,      V = variance of the seeds' own ratios,  t ~ Student with its degrees of freedom

and the interval runs between the draws' quantiles. `V` is the sample variance of the series' own seeds, with S - 1
degrees of freedom, unless the caller knows it better: differences of arms have one that is pooled over all arms
(`intarsia.ladder.scatter`). Documents are many, so the plain bootstrap serves. Seeds
are few: drawing two, three or four of them with replacement makes an interval that is far too narrow (with
three seeds a nominal 95 % covers about 75 %: `tests/ladder/test_statistics.py` shows it), because it has too
few distinct draws and its variance is short of a factor `(S - 1) / S`. Drawing the seeds' part from Student's
distribution is the parametric bootstrap of a normal mean; with documents fixed it gives exactly the classical
t-interval. The interaction is in both parts, so it is taken out of the documents' part: the spread of that part is
shrunk so that its variance is what the documents' means scatter beyond what the scatter over seeds explains, which is
the estimate of two-way analysis of variance, `(MS_seed + MS_document - MS_interaction) / (S D)`.

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
from intarsia.ladder.scatter import Scatter, own_scatter
from intarsia.ladder.student import Array, student_t_quantile

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
    seed_noise: float | None = None
    """Standard deviation of one seed's value; None with one seed."""
    degrees: int = 0
    """Of freedom that it was estimated with."""

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
    scatter: Sequence[Scatter | None] = (),
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
        scatter: of each quantity's seeds, where more is known of it than its own values say.
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
    known = [*scatter, *[None] * (len(series) - len(scatter))]
    for column, (bits, given) in enumerate(zip(series, known, strict=True)):
        seeds = bits.shape[0]
        per_seed = ratio(bits, sizes)
        value = float(per_seed.mean())
        draws = value + (by_documents[:, column] - value) * _shrinkage(bits, per_seed, sizes)
        variance = float(draws.var(ddof=1))
        noise = given or own_scatter(per_seed) if seeds > 1 else None
        if noise is not None:
            seed_error = float(np.sqrt(noise.variance / seeds))
            draws = draws + seed_error * rng.permutation(student_t_quantile(slices, noise.degrees))
            variance += seed_error**2
        estimates.append(
            Estimate(
                value=value,
                interval=_interval(draws, confidence),
                simultaneous=_interval(draws, 1 - (1 - confidence) / comparisons),
                standard_error=float(np.sqrt(variance)),
                per_seed=tuple(float(x) for x in per_seed),
                documents=int(sizes.shape[0]),
                seed_noise=None if noise is None else float(np.sqrt(noise.variance)),
                degrees=0 if noise is None else noise.degrees,
            )
        )
    return estimates


def _shrinkage(bits: Array, per_seed: Array, text_bytes: Array) -> float:
    """By how much the documents' part has less spread without the interaction, which the seeds' part has already.

    Args:
        bits: [S, D].
        per_seed: ratios [S].
    """
    seeds = bits.shape[0]
    if seeds == 1:
        return 1.0
    residuals = bits - per_seed[:, None] * text_bytes
    total = float((residuals.mean(axis=0) ** 2).sum())
    interaction = float(residuals.var(axis=0, ddof=1).sum() / seeds)
    return float(np.sqrt(max(0.0, 1 - interaction / total))) if total > 0 else 1.0


def _interval(draws: Array, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high), confidence)
