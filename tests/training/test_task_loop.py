"""Training on a task: it is learned, it ends when it is known, and a seed gives the same run again."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Mapping

import pytest
import torch

from intarsia.errors import ConfigError, TrainingError
from intarsia.jobs.progress import NoProgress
from intarsia.mixers import KDAConfig
from intarsia.model import FeedForwardConfig, ModelConfig
from intarsia.tasks import MQAR, Palindrome, examine
from intarsia.training import TrainConfig
from intarsia.training.task_loop import train_on_task

TASK = Palindrome(5, symbols=3)
MODEL = ModelConfig(
    TASK.vocab_size,
    d_model=32,
    depth=2,
    layout="kda",
    mixers={"kda": KDAConfig(num_heads=2, head_dim=16)},
    feed_forward=FeedForwardConfig(64),
    init_std=0.2,
)
CONFIG = TrainConfig(steps=300, rows=16, length=5, optimizer="adamw", lr=1e-2, warmup_steps=10)


def test_an_easy_task_is_learned_and_training_ends() -> None:
    result = train_on_task(MODEL, CONFIG, TASK, examples=32, examine_every=10, device="cpu")
    assert result.finished
    assert result.validation.perfect
    assert result.steps < CONFIG.steps
    assert result.steps % 10 == 0
    assert result.tokens == result.steps * 16 * 5
    assert [point.step for point in result.curve] == list(range(10, result.steps + 1, 10))
    assert result.curve[-1].sequences == 1.0
    assert all(point.sequences < 1 for point in result.curve[:-1])
    # The validation is that of the seed, and the model that comes back is the one that was examined.
    again = examine(result.model, TASK, seed=CONFIG.data_seed, examples=32, split="validation")
    assert again == result.validation


def test_a_seed_gives_the_same_run() -> None:
    config = CONFIG.replace(steps=20, lr=1e-4)  # not learned so soon
    first, second = (
        train_on_task(MODEL, config, TASK, examples=8, examine_every=9, device="cpu") for _ in range(2)
    )
    assert first.curve == second.curve
    assert [point.step for point in first.curve] == [9, 18, 20], "and at the end"
    assert all(
        torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True)
    )
    other = train_on_task(MODEL, config.replace(data_seed=1), TASK, examples=8, examine_every=9, device="cpu")
    assert other.curve != first.curve


class Stop(NoProgress):
    """Asks the process to end after some steps."""

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_it_can_be_stopped() -> None:
    result = train_on_task(MODEL, CONFIG, TASK, examples=8, progress=Stop(), device="cpu")
    assert (result.finished, result.steps) == (False, 3)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="different tokens and the model 4"):
        train_on_task(MODEL, CONFIG, MQAR(16), device="cpu")
    wild = dataclasses.replace(CONFIG, lr=1e30)
    with pytest.raises(TrainingError, match=r"is (nan|inf)"):
        train_on_task(MODEL, wild, TASK, examples=8, device="cpu")
