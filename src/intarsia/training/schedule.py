"""Learning-rate schedules: pure functions from the number of finished steps to a multiplier of the peak."""

from __future__ import annotations

import math

from intarsia.training.config import TrainConfig


def multiplier(config: TrainConfig, step: int) -> float:
    """What the peak learning rate is multiplied by in the step that follows `step` finished ones.

    All schedules first rise linearly over `warmup_steps`, so that the first step is `1 / warmup_steps`
    of the peak and not zero.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "wsd":
        return warmup_stable_decay(
            step, config.steps, config.warmup_steps, config.decay_fraction, config.final_lr_fraction
        )
    if config.schedule == "cosine":
        return cosine(step, config.steps, config.warmup_steps, config.final_lr_fraction)
    return 1.0


def stable_until(config: TrainConfig) -> int | None:
    """How many steps are taken before the end of the run begins to show in the learning rate; None for a cosine, which
    knows its end from the start. Up to there the steps of a longer run are the same."""
    if config.schedule == "wsd":
        return config.steps - _decay_steps(config.steps, config.warmup_steps, config.decay_fraction)
    return config.steps if config.schedule == "constant" else None


def first_difference(a: TrainConfig, b: TrainConfig, steps: range) -> int | None:
    """The first of `steps` (counted from 0) in which the learning rates of two configurations differ."""
    return next((s for s in steps if a.lr * multiplier(a, s) != b.lr * multiplier(b, s)), None)


def _decay_steps(steps: int, warmup_steps: int, decay_fraction: float) -> int:
    return min(round(decay_fraction * steps), steps - warmup_steps)


def warmup_stable_decay(
    step: int, steps: int, warmup_steps: int, decay_fraction: float, final: float
) -> float:
    """Constant, then linear to `final` over the last `decay_fraction` of all steps (Hu et al. 2024, MiniCPM).

    Linear because Hägele et al. 2024 (arXiv:2405.18392) found nothing better that is as simple. `final` would
    be reached one step after the last, so that with `final = 0` no step is wasted.
    """
    decay_steps = _decay_steps(steps, warmup_steps, decay_fraction)
    left = steps - step
    if left >= decay_steps:
        return 1.0
    return final + (1 - final) * left / decay_steps


def cosine(step: int, steps: int, warmup_steps: int, final: float) -> float:
    """Half a cosine from 1, after the warm-up, to `final` at the end."""
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
