"""The honest verdict: what a comparison has shown, and what it has not.

An arm is called better than another only if the simultaneous interval of their paired difference leaves out
zero: all pairs are compared at once, so each interval is made at `1 - (1 - confidence) / pairs` (Bonferroni),
and the chance that any of the claims is wrong is at most `1 - confidence`. Otherwise the sentence says that this
budget shows no difference, and how large a difference it could have missed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from intarsia.ladder.caveats import caveats_of
from intarsia.ladder.headline import headline
from intarsia.ladder.pairs import PairVerdict, bits_of, judge_pairs
from intarsia.ladder.plan import Plan
from intarsia.ladder.power import Power, power_of
from intarsia.ladder.results import Results
from intarsia.ladder.statistics import Estimate, estimate
from intarsia.ladder.words import count

__all__ = ["PairVerdict", "Power", "Verdict", "VerdictRow", "judge"]


@dataclass(frozen=True)
class VerdictRow:
    """An arm or a baseline in the table; `estimate` is None for an arm of which no run finished."""

    name: str
    note: str
    estimate: Estimate | None
    is_baseline: bool = False
    choice_loss: float | None = None
    """What the choice of its learning rate may have cost an arm, in bits per byte; None where it cannot be known."""


@dataclass(frozen=True)
class Verdict:
    """What came out. `sentence` is the whole of it in a line or two."""

    sentence: str
    pairs: tuple[PairVerdict, ...]
    rows: tuple[VerdictRow, ...]
    best: str | None
    """The arm that was judged better than every other that finished runs; None while there is none."""
    lowest: str | None
    """The arm with the lowest bits per byte; to be the lowest is not the same as being judged better."""
    unbeaten: tuple[str, ...]
    """The arms than which no other was judged better: one of them is the best, as far as can be told."""
    caveats: tuple[str, ...]
    confidence: float
    """Of the intervals. In a sequential comparison, what is left of the plan's for this look."""
    notes: tuple[str, ...] = ()
    """What belongs beside the sentence: what context was judged, and what else lies in the directory."""
    power: Power | None = None
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Everything that verdict.json holds besides: plan, runs, measurements, environment."""

    def row(self, name: str) -> VerdictRow:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; what verdict.json holds."""
        return {
            "sentence": self.sentence,
            "notes": list(self.notes),
            "best": self.best,
            "lowest": self.lowest,
            "unbeaten": list(self.unbeaten),
            "confidence": self.confidence,
            "power": None if self.power is None else asdict(self.power),
            "pairs": [{**asdict(pair), "firm": pair.firm} for pair in self.pairs],
            "rows": [asdict(row) for row in self.rows],
            "caveats": list(self.caveats),
            **self.record,
        }


def judge(
    plan: Plan, results: Results, *, confidence: float | None = None, notes: Sequence[str] = ()
) -> Verdict:
    """Judge the results of a plan.

    Args:
        confidence: of the intervals; the plan's by default.
        notes: what else belongs beside the sentence.
    """
    options = plan.evaluation
    confidence = options.confidence if confidence is None else confidence
    if not results.arms:
        sentence = (
            "Nothing was judged by text. How the models did on the exams is in the table, without a verdict."
        )
        caveats = tuple(caveats_of(plan, results, (), None))
        return Verdict(sentence, (), (), None, None, (), caveats, confidence)
    pairs = judge_pairs(results.arms, results.text_bytes, options, confidence)
    finished = [arm for arm in results.arms if arm.judged]
    levels = estimate(
        [bits_of(arm, sorted(arm.judged)) for arm in finished]
        + [baseline.bits[None] for baseline in results.baselines],
        results.text_bytes,
        confidence=options.confidence,
        resamples=options.resamples,
        seed=options.seed,
    )
    arm_levels = {arm.name: level for arm, level in zip(finished, levels, strict=False)}
    rows = [
        VerdictRow(arm.name, arm.note, arm_levels.get(arm.name), choice_loss=pairs.losses[arm.name])
        for arm in results.arms
    ] + [
        VerdictRow(baseline.name, baseline.note, level, is_baseline=True)
        for baseline, level in zip(results.baselines, levels[len(finished) :], strict=True)
    ]
    power = power_of(plan, pairs.scatter, len(pairs.verdicts), confidence)
    beaten = {
        pair.second if pair.better == pair.first else pair.first for pair in pairs.verdicts if pair.better
    }
    return Verdict(
        sentence=headline(results, pairs.verdicts),
        pairs=pairs.verdicts,
        rows=tuple(rows),
        best=_best([arm.name for arm in finished], pairs.verdicts),
        lowest=min(arm_levels, key=lambda name: arm_levels[name].value) if arm_levels else None,
        unbeaten=tuple(arm.name for arm in finished if arm.name not in beaten),
        caveats=tuple(caveats_of(plan, results, _behind(rows), power)),
        confidence=confidence,
        notes=(*_context(results), *notes),
        power=power,
    )


def _best(names: Sequence[str], pairs: Sequence[PairVerdict]) -> str | None:
    """The arm of those that finished runs that was judged better than each other of them."""
    wins = [pair.better for pair in pairs]
    most = len(names) - 1
    return next((name for name in names if wins.count(name) == most), None) if most else None


def _context(results: Results) -> list[str]:
    """What context was judged."""
    if not results.length:
        return []
    return [
        f"Judged in pieces of {count(results.length)} tokens, each read from nothing: "
        "no prediction saw a longer context."
    ]


def _behind(rows: list[VerdictRow]) -> list[str]:
    """The arms that are not better than the best baseline."""
    counting = [row.estimate.value for row in rows if row.is_baseline and row.estimate]
    return [
        row.name
        for row in rows
        if not row.is_baseline and row.estimate and counting and row.estimate.value > min(counting)
    ]
