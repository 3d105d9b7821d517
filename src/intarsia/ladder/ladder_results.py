"""What the rungs of a ladder show together: laws, compute multipliers, crossings, and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from intarsia.errors import ConfigError
from intarsia.ladder.gates import GateDecision
from intarsia.ladder.pairs import per_seed
from intarsia.ladder.results import ArmResult, Results
from intarsia.ladder.rungs import LadderPlan, Rung
from intarsia.ladder.scaling_compare import Crossing, Multiplier, crossing, measured_compute, multiplier
from intarsia.ladder.scaling_law import Point, ScalingFit, fit_law
from intarsia.ladder.verdict import Verdict
from intarsia.ladder.words import count, listed

_PLACES = 7
"""At so many amounts of compute multipliers are found."""


@dataclass(frozen=True)
class RungResult:
    """A rung that was climbed."""

    rung: Rung
    path: Path
    results: Results
    verdict: Verdict
    decisions: tuple[GateDecision, ...]

    def arm(self, name: str) -> ArmResult | None:
        """None for an arm that had stopped before."""
        return next((arm for arm in self.results.arms if arm.name == name), None)

    def level(self, name: str) -> tuple[float, float, float] | None:
        """Bits per byte of an arm, with the ends of their interval; None if no run finished."""
        row = next((row for row in self.verdict.rows if row.name == name), None)
        if row is None or row.estimate is None:
            return None
        return row.estimate.value, row.estimate.interval.low, row.estimate.interval.high


@dataclass(frozen=True)
class Law:
    """The scaling law of an arm, or why there is none."""

    fit: ScalingFit | None
    why_not: str = ""


@dataclass(frozen=True)
class Against:
    """An arm against the baseline by their laws, or why that cannot be said."""

    multipliers: tuple[Multiplier, ...] = ()
    crossing: Crossing | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Ascent:
    """What came of a ladder. `sentence` is the whole of it in a few lines."""

    ladder: LadderPlan
    rungs: tuple[RungResult, ...]
    ended: str
    """Why the rungs above were not climbed; empty if all were."""
    seconds: float
    laws: Mapping[str, Law]
    against: Mapping[str, Against]
    """By arm, the baseline left out."""
    sentence: str

    @classmethod
    def of(cls, ladder: LadderPlan, rungs: Sequence[RungResult], ended: str, seconds: float) -> Ascent:
        """What the rungs show together."""
        laws = {arm: _law(arm, rungs) for arm in ladder.arms}
        others = [arm for arm in ladder.arms if arm != ladder.baseline]
        against = {arm: _against(laws[arm], laws[ladder.baseline]) for arm in others}
        sentence = _sentence(ladder, rungs, ended, against)
        return cls(ladder, tuple(rungs), ended, seconds, laws, against, sentence)

    @property
    def not_climbed(self) -> list[str]:
        """The rungs that were left out."""
        climbed = {result.rung.name for result in self.rungs}
        return [rung.name for rung in self.ladder.rungs if rung.name not in climbed]

    def stopped(self, arm: str) -> GateDecision | None:
        """The decision by which an arm was stopped, if it was."""
        return next(
            (d for result in self.rungs for d in result.decisions if d.arm == arm and not d.climbs), None
        )


def points_of_arm(arm: str, rungs: Sequence[RungResult]) -> list[Point]:
    """The judged runs of an arm on all rungs: parameters without embeddings, tokens, bits per byte."""
    points = []
    for result in rungs:
        found = result.arm(arm)
        if found is not None:
            scores = per_seed(found, result.results.text_bytes)
            points += [
                Point(found.non_embedding_parameters, found.tokens, score)
                for _, score in sorted(scores.items())
            ]
    return points


def _law(arm: str, rungs: Sequence[RungResult]) -> Law:
    try:
        fit = fit_law(points_of_arm(arm, rungs))
    except ConfigError as error:
        return Law(None, f"{error}.")
    if not fit.law.a or not fit.law.b:
        what = "more parameters" if not fit.law.a else "more tokens"
        return Law(
            None, f"The best fit says that {what} do nothing for the loss, so that there is no best size."
        )
    return Law(fit)


def _against(arm: Law, baseline: Law) -> Against:
    if arm.fit is None or baseline.fit is None:
        return Against(why_not="A law is missing.")
    try:
        low, high = measured_compute([arm.fit, baseline.fit])
    except ConfigError as error:
        return Against(why_not=f"{error}.")
    places = np.geomspace(low, high, _PLACES)
    return Against(
        tuple(multiplier(arm.fit, baseline.fit, float(place)) for place in places),
        crossing(arm.fit, baseline.fit),
    )


def _sentence(
    ladder: LadderPlan, rungs: Sequence[RungResult], ended: str, against: Mapping[str, Against]
) -> str:
    if not rungs:
        return "Nothing was climbed."
    top = rungs[-1]
    said = [f"On the highest rung ({top.rung.name}): {top.verdict.sentence}"]
    for arm, found in against.items():
        if found.multipliers:
            last = found.multipliers[-1]
            said.append(
                f"By the scaling laws {ladder.baseline} needs {_times(last.value)} [{_times(last.low)}, "
                f"{_times(last.high)}] times the compute of {arm} for the same loss, at {last.compute:.2g} FLOPs."
            )
        if found.crossing is not None and found.crossing.compute is not None and found.crossing.share >= 0.95:
            said.append(f"{arm} and {ladder.baseline}: {found.crossing.sentence}")
    stopped = [
        f"{d.arm} after {result.rung.name}" for result in rungs for d in result.decisions if not d.climbs
    ]
    if stopped:
        said.append(f"Stopped at a gate: {listed(stopped)}.")
    if ended:
        said.append(ended)
    return " ".join(said)


def _times(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "∞"


def compute_of(arm: ArmResult) -> float:
    """FLOPs that a judged run of the arm spends, by its own count."""
    return (arm.training_flops_per_token or 0.0) * arm.tokens


def rung_title(result: RungResult) -> str:
    """`small-100k: 1.2 M parameters, 100 k tokens`."""
    sizes = [arm.non_embedding_parameters for arm in result.results.arms]
    tokens = [arm.tokens for arm in result.results.arms]
    spans = [" to ".join(dict.fromkeys((count(min(each)), count(max(each))))) for each in (sizes, tokens)]
    return f"{result.rung.name}: {spans[0]} parameters, {spans[1]} tokens"
