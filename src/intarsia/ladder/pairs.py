"""Two arms compared: the estimate, the outcome, and what weakens it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from intarsia.ladder.plan_tables import EvaluationOptions
from intarsia.ladder.rate_choice import at_edge, choice_loss
from intarsia.ladder.results import ArmResult
from intarsia.ladder.scatter import PooledScatter, Scatter, pool_scatter
from intarsia.ladder.statistics import Estimate, estimate, ratio
from intarsia.ladder.student import Array
from intarsia.ladder.words import UNIT, amount, bracket

Outcome = Literal["better", "worse", "equal", "undecided", "unjudged"]


@dataclass(frozen=True)
class PairVerdict:
    """Two arms compared. `difference` is first minus second in bits per byte: below zero, the first is better."""

    first: str
    second: str
    outcome: Outcome
    difference: Estimate | None
    seeds: tuple[int, ...]
    sentence: str
    weaknesses: tuple[str, ...] = ()
    """In sentences, why the outcome is one of the learning rates that were chosen and no more."""

    @property
    def better(self) -> str | None:
        return {"better": self.first, "worse": self.second}.get(self.outcome)

    @property
    def firm(self) -> bool:
        """Whether one is better, and nothing about the choice of the rates could have made it so."""
        return self.better is not None and not self.weaknesses


@dataclass(frozen=True)
class Pairs:
    """All pairs of arms, and what they were judged by."""

    verdicts: tuple[PairVerdict, ...]
    scatter: PooledScatter | None
    """The noise of one run; None where it cannot be known."""
    losses: Mapping[str, float | None]
    """What the choice of its rate may have cost each arm."""


def judge_pairs(
    arms: Sequence[ArmResult], text_bytes: Array, options: EvaluationOptions, confidence: float
) -> Pairs:
    """Compare each arm with those before it in the plan: the first is usually the baseline."""
    pairs = [(later, earlier) for index, later in enumerate(arms) for earlier in arms[:index]]
    pairs.sort(key=lambda pair: (arms.index(pair[1]), arms.index(pair[0])))
    shared = {(a.name, b.name): tuple(sorted(a.judged.keys() & b.judged.keys())) for a, b in pairs}
    live = [(a, b) for a, b in pairs if shared[a.name, b.name]]
    table = {arm.name: per_seed(arm, text_bytes) for arm in arms if arm.judged}
    scatter = pool_scatter(table, [(a.name, b.name) for a, b in live]) if live else None
    series = [bits_of(a, shared[a.name, b.name]) - bits_of(b, shared[a.name, b.name]) for a, b in live]
    differences = estimate(
        series,
        text_bytes,
        scatter=[_scatter_of(one, scatter) for one in series],
        confidence=confidence,
        comparisons=max(len(live), 1),
        resamples=options.resamples,
        seed=options.seed,
    )
    by_pair = {(a.name, b.name): value for (a, b), value in zip(live, differences, strict=True)}
    losses = {arm.name: choice_loss(arm, scatter, options.confidence) for arm in arms}
    return Pairs(
        tuple(
            _judge(a, b, by_pair.get((a.name, b.name)), shared[a.name, b.name], options.margin, losses)
            for a, b in pairs
        ),
        scatter,
        losses,
    )


def per_seed(arm: ArmResult, text_bytes: Array) -> dict[int, float]:
    """The arm's bits per byte with each seed that finished."""
    return {
        seed: float(ratio(run.bits, text_bytes)) for seed, run in arm.judged.items() if run.bits is not None
    }


def bits_of(arm: ArmResult, seeds: Sequence[int]) -> Array:
    """Bits of each document under each seed [S, D]."""
    bits = [arm.judged[seed].bits for seed in seeds]
    return np.stack([row for row in bits if row is not None])


def _scatter_of(series: Array, pooled: PooledScatter | None) -> Scatter | None:
    """A pair goes by all arms' runs, unless they scatter unlike each other and it has enough of its own."""
    if pooled is None or (not pooled.equal and series.shape[0] > 1):
        return None
    return pooled.of_pairs


def _judge(
    a: ArmResult,
    b: ArmResult,
    difference: Estimate | None,
    seeds: tuple[int, ...],
    margin: float | None,
    losses: Mapping[str, float | None],
) -> PairVerdict:
    failures = failures_of(a, b)
    if difference is None:
        text = f"{a.name} and {b.name} cannot be compared: no seed was finished by both{failures}."
        return PairVerdict(a.name, b.name, "unjudged", None, (), text)
    lower, higher = (a, b) if difference.value <= 0 else (b, a)
    size = abs(difference.value)
    if not difference.covers_seeds:
        text = (
            f"{lower.name} was below {higher.name} by {amount(size)} {UNIT} with the one seed that both finished: "
            f"one seed cannot tell an architecture from its luck{failures}."
        )
        return PairVerdict(a.name, b.name, "unjudged", difference, seeds, text)
    interval = difference.simultaneous
    # The sentence speaks of the better arm's advantage, so the interval is turned its way round.
    low, high = (-interval.high, -interval.low) if lower is a else (interval.low, interval.high)
    gain = bracket(low, high)
    outcome: Outcome
    doubted: tuple[str, ...]
    if not interval.contains(0):
        outcome = "better" if lower is a else "worse"
        small = margin is not None and max(abs(low), abs(high)) < margin
        text = f"{lower.name} is better than {higher.name} by {amount(size)} {UNIT} {gain}"
        text += f", which is less than the margin of {margin:g} that the plan cares about" if small else ""
        doubted = (*_edge(higher), *_lossy(higher, losses[higher.name], low))
    elif margin is not None and -margin < low and high < margin:
        outcome = "equal"
        text = f"{a.name} and {b.name} are equal within {margin:g} {UNIT} (difference {amount(size)} {gain})"
        doubted = (*_edge(a), *_edge(b))
    else:
        outcome = "undecided"
        text = (
            f"No difference between {a.name} and {b.name} that this budget can show: "
            f"{lower.name} is lower by {amount(size)} {UNIT} {gain}"
        )
        doubted = (*_edge(a), *_edge(b))
    sentence = " ".join([f"{text}{failures}.", *doubted])
    return PairVerdict(a.name, b.name, outcome, difference, seeds, sentence, doubted)


def _edge(arm: ArmResult) -> tuple[str, ...]:
    """That the arm's rate is at the end of its grid, if it is."""
    end = at_edge(arm)
    if not end:
        return ()
    return (
        f"But {arm.name} did best with the {end} rate that was tried ({arm.learning_rate:g}) and may do better "
        "beyond it.",
    )


def _lossy(arm: ArmResult, loss: float | None, gain: float) -> tuple[str, ...]:
    """That another rate might have saved the arm that lost, if the choice was so noisy.

    Args:
        gain: the least that the other is better by.
    """
    if loss is None or loss <= gain:
        return ()
    return (
        f"But the choice of its rate rests on one run for each, and may have cost {arm.name} up to "
        f"{amount(loss)} {UNIT}.",
    )


def failures_of(*arms: ArmResult) -> str:
    """In brackets, in how many runs each arm failed; empty where none did."""
    parts = [
        f"{arm.name} failed in {len(arm.failed)} of {len(arm.failed) + len(arm.judged)} runs"
        for arm in arms
        if arm.failed
    ]
    return f" ({'; '.join(parts)})" if parts else ""
