"""The record of a comparison: what verdict.json holds besides the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from intarsia.ladder.plan import Plan
from intarsia.ladder.results import ExamResult, Results
from intarsia.tasks.exam import Answers


def record_of(plan: Plan, results: Results, report: Path) -> dict[str, Any]:
    """What verdict.json holds besides the verdict, as JSON-able values."""
    return {
        "plan": plan.to_dict(),
        "corpus": results.corpus,
        "tokenizer": results.tokenizer,
        "documents": len(results.text_bytes),
        "text_bytes": float(results.text_bytes.sum()),
        "steps": results.steps,
        "tokens_per_run": results.tokens_per_run,
        "judged_context": results.length,
        "arms": [
            {
                "name": arm.name,
                "layout": arm.layout,
                "parameters": arm.parameters,
                "non_embedding_parameters": arm.non_embedding_parameters,
                "change": arm.change,
                "active_parameters": arm.active_parameters,
                "steps": arm.steps,
                "tokens": arm.tokens,
                "learning_rate": arm.learning_rate,
                "rates_beyond_grid": list(arm.beyond),
                "tuning": {f"{rate:g}": score for rate, score in arm.tuning_scores.items()},
                "training_flops_per_token": arm.training_flops_per_token,
                "measurements": asdict(arm.measurements),
                "runs": [
                    {
                        "learning_rate": run.learning_rate,
                        "seed": run.seed,
                        "role": run.role,
                        "directory": run.directory,
                        "bits_per_byte": run.tuning_bits_per_byte
                        if run.bits is None
                        else float(run.bits.sum() / results.text_bytes.sum()),
                        "failure": asdict(run.failure) if run.failure else None,
                        "positions": [asdict(position) for position in run.positions],
                        "batches": run.batches,
                        "seconds": run.seconds,
                    }
                    for run in sorted(
                        arm.runs, key=lambda run: (run.role != "tuning", run.learning_rate, run.seed)
                    )
                ],
                "model": dict(arm.model),
            }
            for arm in results.arms
        ],
        "exams": [_exam(exam) for exam in results.exams],
        "samples": [asdict(sample) for sample in results.samples],
        "environment": dict(results.environment),
        "seconds": results.seconds,
        "report": str(report),
    }


def _exam(exam: ExamResult) -> dict[str, Any]:
    return {
        "name": exam.name,
        "task": exam.task,
        "options": dict(exam.options),
        "dials": {name: list(values) for name, values in exam.dials.items()},
        "mixed": {name: list(values) for name, values in exam.mixed.items()},
        "steps": exam.steps,
        "rows": exam.rows,
        "examples": exam.examples,
        "arms": [
            {
                "name": arm.name,
                "non_embedding_parameters": arm.parameters,
                "learning_rate": arm.learning_rate,
                "rates_beyond_grid": list(arm.beyond),
                "at_edge_of_grid": arm.at_edge,
                "answers": dict(zip(("mean", "least", "most"), arm.answers or (None,) * 3, strict=True)),
                "sequences": arm.sequences,
                "runs": [
                    {
                        "learning_rate": run.learning_rate,
                        "seed": run.seed,
                        "role": run.role,
                        "directory": run.directory,
                        "failure": asdict(run.failure) if run.failure else None,
                        "steps": run.exam.steps if run.exam else None,
                        "validation": _counts(run.exam.validation) if run.exam else None,
                        "test": _counts(run.exam.test) if run.exam and run.exam.test else None,
                        "turns": [
                            {"options": dict(turn.options), "test": _counts(turn.test)}
                            for turn in (run.exam.turns if run.exam else ())
                        ],
                        "seconds": run.seconds,
                    }
                    for run in sorted(
                        arm.runs, key=lambda run: (run.role != "tuning", run.learning_rate, run.seed)
                    )
                ],
            }
            for arm in exam.arms
        ],
    }


def _counts(answers: Answers) -> dict[str, Any]:
    """Counts with intervals; those of each sequence stay in the run's directory."""
    return {name: value for name, value in answers.to_dict().items() if name != "by_sequence"}


def jsonable(value: Any) -> Any:
    """`value` with null for numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
