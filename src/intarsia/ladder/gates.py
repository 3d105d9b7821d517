"""Which arms climb from a rung to the next, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intarsia.files import write_json
from intarsia.ladder.results import Results
from intarsia.ladder.rungs import Gates
from intarsia.ladder.verdict import Verdict
from intarsia.ladder.words import UNIT, amount, bracket

FILE = "gates.json"


@dataclass(frozen=True)
class GateDecision:
    """Whether an arm climbs. The numbers are bits per byte over the baseline's: below zero, the arm is better."""

    arm: str
    climbs: bool
    reason: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    """Ends of the interval by which it was decided; None where there is none."""


def decide(results: Results, verdict: Verdict, gates: Gates, baseline: str) -> tuple[GateDecision, ...]:
    """Hold each arm of a rung against the baseline.

    The interval is the one by which the rung's verdict goes (simultaneous over all pairs), so that the chance that any
    arm is stopped which is not worse by more than the margin is at most what the plan allows for errors.
    """
    return tuple(_decide(arm.name, results, verdict, gates, baseline) for arm in results.arms)


def _decide(arm: str, results: Results, verdict: Verdict, gates: Gates, baseline: str) -> GateDecision:
    if arm == baseline:
        finished = bool(results.arm(arm).judged)
        return GateDecision(
            arm, finished, "It is the baseline." if finished else "The baseline finished no run."
        )
    if not results.arm(arm).judged:
        return GateDecision(arm, False, "It finished no run.")
    pair = next(pair for pair in verdict.pairs if {pair.first, pair.second} == {arm, baseline})
    if pair.difference is None:
        return GateDecision(
            arm, False, f"It cannot be held against {baseline}: no seed was finished by both."
        )
    sign = 1 if pair.first == arm else -1
    value = sign * pair.difference.value
    interval = pair.difference.simultaneous
    low, high = sorted((sign * interval.low, sign * interval.high))
    margin = f"the margin of {gates.margin:g}"
    worse = f"{amount(abs(value))} {UNIT} {'worse' if value > 0 else 'better'} than {baseline}"
    if not pair.difference.covers_seeds:
        climbs = value <= gates.margin
        within = "within" if climbs else "beyond"
        return GateDecision(
            arm, climbs, f"With one seed, which shows no interval, it is {worse}: {within} {margin}.", value
        )
    said = f"It is {worse} {bracket(low, high) if value > 0 else bracket(-high, -low)}"
    if gates.strict:
        climbs = high <= gates.margin
        reason = f"{said}: {'shown' if climbs else 'not shown'} to be within {margin}."
    else:
        climbs = low <= gates.margin
        reason = f"{said}: {'not shown to be' if climbs else 'shown to be'} worse by more than {margin}."
    return GateDecision(arm, climbs, reason, value, low, high)


def keep_decisions(
    directory: Path, rung: str, gates: Gates, baseline: str, decisions: Sequence[GateDecision]
) -> None:
    """Write them into a rung's directory. Others that were made there before stay on record, since runs followed from
    them."""
    path = directory / FILE
    made: dict[str, Any] = {
        "rung": rung,
        "gates": {**asdict(gates), "baseline": baseline},
        "decisions": [asdict(decision) for decision in decisions],
    }
    before: list[dict[str, Any]] = []
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        before = found.pop("before", [])
        if found != made:
            before = [*before, found]
    write_json(path, {**made, "before": before})
