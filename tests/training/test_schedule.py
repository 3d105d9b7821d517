"""Schedules: where they start, where they end, and that they never jump."""

from __future__ import annotations

import pytest

from intarsia.training import TrainConfig
from intarsia.training.schedule import multiplier


def curve(**options) -> list[float]:
    config = TrainConfig(**options)
    return [multiplier(config, step) for step in range(config.steps)]


def test_warmup_stable_decay():
    values = curve(steps=20, warmup_steps=4, schedule="wsd", decay_fraction=0.25)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4:16] == [1.0] * 12
    assert values[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2], abs=1e-12)


def test_decay_ends_at_the_final_fraction():
    values = curve(steps=100, schedule="wsd", decay_fraction=0.5, final_lr_fraction=0.1)
    assert values[-1] == pytest.approx(0.1 + 0.9 / 50)


def test_decay_may_fill_all_that_the_warmup_leaves():
    values = curve(steps=10, warmup_steps=2, schedule="wsd", decay_fraction=1.0)
    assert values[1] == values[2] == 1.0
    assert values[-1] == pytest.approx(1 / 8)


def test_cosine():
    values = curve(steps=11, warmup_steps=1, schedule="cosine", final_lr_fraction=0.2)
    assert values[1] == 1.0
    assert values[6] == pytest.approx(0.6)
    assert values[-1] == pytest.approx(0.2, abs=0.03)
    assert values[1:] == sorted(values[1:], reverse=True)


def test_constant():
    assert curve(steps=4, warmup_steps=2, schedule="constant") == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 9])
def test_no_step_is_wasted(schedule, warmup):
    values = curve(steps=10, warmup_steps=warmup, schedule=schedule)
    assert all(0 < value <= 1 for value in values)
