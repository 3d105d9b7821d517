"""The honest sentence: what a comparison has shown, and what it has not.

An arm is called better than another only if the simultaneous interval of their paired difference leaves out
zero: all pairs are compared at once, so each interval is made at `1 - (1 - confidence) / pairs` (Bonferroni),
and the chance that any of the claims is wrong is at most `1 - confidence`. Otherwise the sentence says that this
budget shows no difference, and how large a difference it could have missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Literal

from intarsia.ladder.caveats import caveats_of
from intarsia.ladder.plan import Plan
from intarsia.ladder.results import ArmResult, Results
from intarsia.ladder.statistics import Array, Estimate, estimate
from intarsia.ladder.words import UNIT, amount, bracket, listed

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

    @property
    def better(self) -> str | None:
        return {"better": self.first, "worse": self.second}.get(self.outcome)


@dataclass(frozen=True)
class VerdictRow:
    """An arm or a baseline in the table; `estimate` is None for an arm of which no run finished."""

    name: str
    note: str
    estimate: Estimate | None
    is_baseline: bool = False


@dataclass(frozen=True)
class Verdict:
    """What came out. `sentence` is the whole of it in a line or two."""

    sentence: str
    pairs: tuple[PairVerdict, ...]
    rows: tuple[VerdictRow, ...]
    best: str | None
    """The arm with the lowest bits per byte; being best on paper is not the same as being judged better."""
    caveats: tuple[str, ...]
    confidence: float
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Everything that verdict.json holds besides: plan, runs, measurements, environment."""

    def row(self, name: str) -> VerdictRow:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; what verdict.json holds."""
        return {
            "sentence": self.sentence,
            "best": self.best,
            "confidence": self.confidence,
            "pairs": [asdict(pair) for pair in self.pairs],
            "rows": [asdict(row) for row in self.rows],
            "caveats": list(self.caveats),
            **self.record,
        }


def judge(plan: Plan, results: Results) -> Verdict:
    """Judge the results of a plan."""
    if not results.arms:
        sentence = (
            "Nothing was judged by text. How the models did on the exams is in the table, without a verdict."
        )
        caveats = tuple(caveats_of(plan, results, ()))
        return Verdict(sentence, (), (), None, caveats, plan.evaluation.confidence)
    arms = results.arms
    pairs = list(combinations(arms, 2))
    # The later arm of the plan is set against the earlier: the first is usually the baseline.
    pairs = [(later, earlier) for earlier, later in pairs]
    shared = {(a.name, b.name): tuple(sorted(a.judged.keys() & b.judged.keys())) for a, b in pairs}
    judged = [(a, b) for a, b in pairs if shared[a.name, b.name]]
    finished = [arm for arm in arms if arm.judged]
    options = {
        "confidence": plan.evaluation.confidence,
        "resamples": plan.evaluation.resamples,
        "seed": plan.evaluation.seed,
    }
    differences = estimate(
        [_bits(a, shared[a.name, b.name]) - _bits(b, shared[a.name, b.name]) for a, b in judged],
        results.text_bytes,
        comparisons=max(len(judged), 1),
        **options,  # type: ignore[arg-type]
    )
    by_pair = {(a.name, b.name): value for (a, b), value in zip(judged, differences, strict=True)}
    levels = estimate(
        [_bits(arm, tuple(sorted(arm.judged))) for arm in finished]
        + [baseline.bits[None] for baseline in results.baselines],
        results.text_bytes,
        **options,  # type: ignore[arg-type]
    )
    arm_levels = {arm.name: level for arm, level in zip(finished, levels, strict=False)}
    verdicts = tuple(
        _pair(a, b, by_pair.get((a.name, b.name)), shared[a.name, b.name], plan.evaluation.margin)
        for a, b in pairs
    )
    rows = [VerdictRow(arm.name, arm.note, arm_levels.get(arm.name)) for arm in arms] + [
        VerdictRow(baseline.name, baseline.note, level, is_baseline=True)
        for baseline, level in zip(results.baselines, levels[len(finished) :], strict=True)
    ]
    best = min(arm_levels, key=lambda name: arm_levels[name].value) if arm_levels else None
    return Verdict(
        sentence=_overall(results, verdicts),
        pairs=verdicts,
        rows=tuple(rows),
        best=best,
        caveats=tuple(caveats_of(plan, results, _behind(rows))),
        confidence=plan.evaluation.confidence,
    )


def _behind(rows: list[VerdictRow]) -> list[str]:
    """The arms that are not better than the best baseline."""
    counting = [row.estimate.value for row in rows if row.is_baseline and row.estimate]
    return [
        row.name
        for row in rows
        if not row.is_baseline and row.estimate and counting and row.estimate.value > min(counting)
    ]


def _bits(arm: ArmResult, seeds: tuple[int, ...]) -> Array:
    import numpy as np

    runs = arm.judged
    bits = [runs[seed].bits for seed in seeds]
    return np.stack([row for row in bits if row is not None])


def _pair(
    a: ArmResult, b: ArmResult, difference: Estimate | None, seeds: tuple[int, ...], margin: float | None
) -> PairVerdict:
    failures = _failures(a, b)
    if difference is None:
        text = f"{a.name} and {b.name} cannot be compared: no seed was finished by both{failures}."
        return PairVerdict(a.name, b.name, "unjudged", None, seeds, text)
    lower, higher = (a, b) if difference.value < 0 else (b, a)
    size = abs(difference.value)
    if not difference.covers_seeds:
        text = (
            f"{lower.name} was below {higher.name} by {amount(size)} {UNIT} with the one seed that both finished: "
            f"one seed cannot tell an architecture from its luck{failures}."
        )
        return PairVerdict(a.name, b.name, "unjudged", difference, seeds, text)
    interval = difference.simultaneous
    # The sentence speaks of the better arm's advantage, so the interval is turned its way round.
    gain = bracket(-interval.high, -interval.low) if lower is a else bracket(interval.low, interval.high)
    outcome: Outcome
    if not interval.contains(0):
        outcome = "better" if lower is a else "worse"
        small = margin is not None and max(abs(interval.low), abs(interval.high)) < margin
        text = f"{lower.name} is better than {higher.name} by {amount(size)} {UNIT} {gain}"
        text += f", which is less than the margin of {margin:g} that the plan cares about" if small else ""
    elif margin is not None and -margin < interval.low and interval.high < margin:
        outcome = "equal"
        text = f"{a.name} and {b.name} are equal within {margin:g} {UNIT} (difference {amount(size)} {gain})"
    else:
        outcome = "undecided"
        text = (
            f"No difference between {a.name} and {b.name} that this budget can show: "
            f"{lower.name} is lower by {amount(size)} {UNIT} {gain}"
        )
    return PairVerdict(a.name, b.name, outcome, difference, seeds, f"{text}{failures}.")


def _failures(*arms: ArmResult) -> str:
    parts = [
        f"{arm.name} failed in {len(arm.failed)} of {len(arm.failed) + len(arm.judged)} runs"
        for arm in arms
        if arm.failed
    ]
    return f" ({'; '.join(parts)})" if parts else ""


def _overall(results: Results, pairs: tuple[PairVerdict, ...]) -> str:
    names = [arm.name for arm in results.arms]
    absent = [arm.name for arm in results.arms if not arm.judged]
    note = (
        f" {listed(absent)} finished no run and {'is' if len(absent) == 1 else 'are'} not judged."
        if absent
        else ""
    )
    live = [pair for pair in pairs if pair.difference is not None]
    if not live:
        who = f"both {listed(names)}" if len(names) == 2 else f"any two of {listed(names)}"
        return f"No verdict: no seed was finished by {who}{_failures(*results.arms)}.{note}"
    if len(live) == 1:
        return live[0].sentence + note
    if any(pair.outcome == "unjudged" for pair in live) and not any(pair.better for pair in live):
        return (
            "No verdict: one seed cannot tell an architecture from its luck. With it, the lowest was "
            f"{_lowest(results, live)}.{note}"
        )
    decided = [pair for pair in live if pair.better]
    present = [name for name in names if name not in absent]
    failures = _failures(*[arm for arm in results.arms if arm.judged])
    if not decided:
        if all(pair.outcome == "equal" for pair in live):
            return f"{listed(present)} are equal within the plan's margin{failures}.{note}"
        widest = max(
            max(abs(p.difference.simultaneous.low), abs(p.difference.simultaneous.high))
            for p in live
            if p.difference
        )
        return (
            f"No difference that this budget can show between {listed(present)}; "
            f"differences up to {amount(widest)} {UNIT} cannot be ruled out{failures}.{note}"
        )
    for name in present:
        beaten = [pair for pair in decided if pair.better == name]
        if len(beaten) == len(present) - 1:
            clauses = [f"better than {_other(pair, name)} by {_gain(pair, name)}" for pair in beaten]
            return f"{name} is the best of {len(present)}: {listed(clauses)}{failures}.{note}"
    clauses = []
    for name in present:
        beaten = [pair for pair in decided if pair.better == name]
        if beaten:
            clauses.append(
                f"{name} is better than " + listed([f"{_other(p, name)} by {_gain(p, name)}" for p in beaten])
            )
    open_pairs = [f"{pair.first} and {pair.second}" for pair in live if not pair.better]
    rest = (
        f"; no difference that this budget can show between {', nor between '.join(open_pairs)}"
        if open_pairs
        else ""
    )
    return f"{'; '.join(clauses)}{rest}{failures}.{note}"


def _lowest(results: Results, live: list[PairVerdict]) -> str:
    scores = {
        arm.name: sum(float(run.bits.sum()) for run in arm.judged.values() if run.bits is not None)
        / len(arm.judged)
        for arm in results.arms
        if arm.judged
    }
    return min(scores, key=lambda name: scores[name])


def _other(pair: PairVerdict, name: str) -> str:
    return pair.second if pair.first == name else pair.first


def _gain(pair: PairVerdict, name: str) -> str:
    """By how much `name` is the better of the pair, with its interval turned that way round."""
    assert pair.difference is not None
    interval, value = pair.difference.simultaneous, pair.difference.value
    if pair.first == name:
        return f"{amount(-value)} {UNIT} {bracket(-interval.high, -interval.low)}"
    return f"{amount(value)} {UNIT} {bracket(interval.low, interval.high)}"
