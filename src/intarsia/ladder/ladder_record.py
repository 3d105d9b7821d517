"""What the verdict.json of a ladder holds. Each number of a rung is in the rung's own, with its runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from intarsia.ladder.ladder_results import Ascent, Law, RungResult, compute_of
from intarsia.ladder.scaling_law import ScalingFit, ScalingLaw


def record_of_ladder(ascent: Ascent, report: Path) -> dict[str, Any]:
    """JSON-able values."""
    return {
        "sentence": ascent.sentence,
        "baseline": ascent.ladder.baseline,
        "rungs": [_rung(result, ascent) for result in ascent.rungs],
        "not_climbed": {"rungs": ascent.not_climbed, "reason": ascent.ended},
        "stopped": {
            arm: decision.reason
            for arm in ascent.ladder.arms
            if (decision := ascent.stopped(arm)) is not None
        },
        "laws": {arm: _law(law) for arm, law in ascent.laws.items()},
        "against_baseline": {
            arm: {
                "multipliers": [asdict(one) for one in found.multipliers],
                "crossing": None
                if found.crossing is None
                else {**asdict(found.crossing), "sentence": found.crossing.sentence},
                "why_not": found.why_not,
            }
            for arm, found in ascent.against.items()
        },
        "plan": ascent.ladder.to_dict(),
        "environment": dict(ascent.rungs[-1].results.environment) if ascent.rungs else {},
        "seconds": ascent.seconds,
        "report": str(report),
    }


def _rung(result: RungResult, ascent: Ascent) -> dict[str, Any]:
    arms = []
    for decision in result.decisions:
        arm, level = result.arm(decision.arm), result.level(decision.arm)
        assert arm is not None
        arms.append(
            {
                "name": arm.name,
                "non_embedding_parameters": arm.non_embedding_parameters,
                "active_parameters": arm.active_parameters,
                "change": arm.change,
                "learning_rate": arm.learning_rate,
                "rates_beyond_grid": list(arm.beyond),
                "tokens": arm.tokens,
                "flops": compute_of(arm),
                "bits_per_byte": None
                if level is None
                else dict(zip(("value", "low", "high"), level, strict=True)),
                "gate": asdict(decision),
                "runs": sorted(run.directory for run in arm.judged.values()),
            }
        )
    return {
        "name": result.rung.name,
        "size": result.rung.size,
        "budget": {key: value for key, value in asdict(result.rung.budget).items() if value is not None},
        "directory": f"rungs/{result.path.name}",
        "sentence": result.verdict.sentence,
        "arms": arms,
    }


def _law(law: Law) -> dict[str, Any]:
    if law.fit is None:
        return {"why_not": law.why_not}
    fit = law.fit
    return {
        **asdict(fit.law),
        "intervals": {
            name: fit.interval(lambda one, name=name: getattr(one, name))  # type: ignore[misc]
            for name in ("irreducible", "alpha", "beta")
        },
        "optimal_size_exponent": {"value": size_exponent(fit.law), "interval": size_exponent_interval(fit)},
        "spread": fit.spread,
        "points": [asdict(point) for point in fit.points],
    }


def size_exponent(law: ScalingLaw) -> float:
    """The compute-optimal number of parameters grows as compute to this power."""
    return law.beta / (law.alpha + law.beta)


def size_exponent_interval(fit: ScalingFit) -> tuple[float, float]:
    """Between what the exponent lies, by the resampled laws."""
    return fit.interval(size_exponent)
