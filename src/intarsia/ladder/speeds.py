"""How fast each arm trains on this machine, for budgets of seconds: timed once, and kept.

    speeds.json    tokens per second of each model that was timed, by what it is and how it is trained

What was timed decides how many steps a run has, so it is never timed again: a comparison that is stopped and goes on,
or moves to another machine, keeps its steps.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from intarsia.errors import TrainingError
from intarsia.files import write_json
from intarsia.ladder.measuring import MeasuredArm, MeasureSpec, measure

if TYPE_CHECKING:
    from rich.console import Console

    from intarsia.ladder.text_trial import TextTrial

FILE = "speeds.json"
_STEPS = 10
"""Timed for each arm, the arms in turn; the median counts."""


def training_speeds(trial: TextTrial, directory: Path, threads: int, console: Console) -> dict[str, float]:
    """Tokens per second with which each arm of a trial trains, with any number of steps.

    Raises:
        TrainingError: an arm cannot be timed.
    """
    path = directory / FILE
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    whole = trial.measure_spec({}, threads)
    keys = {arm.name: _key(arm, threads) for arm in whole.arms}
    missing = tuple(arm for arm in whole.arms if keys[arm.name] not in known)
    if missing:
        found, _ = measure(directory / "speeds", _training_alone(whole, missing), console)
        for arm in missing:
            speed = found[arm.name].training_tokens_per_second if arm.name in found else None
            if not speed:
                raise TrainingError(
                    f"{arm.name} could not be timed: see {directory / 'speeds' / 'measure.log'}"
                )
            known[keys[arm.name]] = speed
        write_json(path, known)
    return {name: known[key] for name, key in keys.items()}


def _training_alone(spec: MeasureSpec, arms: tuple[MeasuredArm, ...]) -> MeasureSpec:
    return replace(spec, arms=arms, contexts=(), sample_tokens=0, throughput_steps=_STEPS)


def _key(arm: MeasuredArm, threads: int) -> str:
    """Hex digits of what decides a speed, the machine apart."""
    train = {
        name: value for name, value in arm.train.items() if name not in ("steps", "lr", "seed", "data_seed")
    }
    text = json.dumps([arm.model, train, threads], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
