"""SIGKILL at any moment, then the same command again: the final numbers are those of an undisturbed run."""

from __future__ import annotations

import random
import time

import pytest

from intarsia.training import train
from support.training_runs import Job, assert_same_run, metrics_of, start


@pytest.fixture
def config(train_config):
    return train_config.replace(steps=40, checkpoint_every=3, eval_every=7, log_every=2)


@pytest.fixture
def whole(model_config, config, dataset, tmp_path):
    """The same run, undisturbed."""
    train(model_config, config, dataset, None, tmp_path / "whole", device="cpu")
    return tmp_path / "whole"


def kill_when(process, ready, patience=120.0):
    """Kill the process as soon as `ready()`; whether it was still running."""
    deadline = time.monotonic() + patience
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline, "the run got nowhere"
        time.sleep(0.002)
    process.kill()
    process.communicate()
    return process.returncode < 0


def test_killed_in_mid_flight(model_config, config, dataset, directory, whole):
    moments = {
        "before the first checkpoint": lambda: len(metrics_of(directory)) >= 1,
        "while a checkpoint is written": lambda: any((directory / "checkpoints").glob(".step-*")),
        "after several checkpoints": lambda: len(metrics_of(directory)) >= 14,
    }
    for moment, ready in moments.items():
        (process,) = start([Job(directory, config)], model_config, dataset)
        assert kill_when(process, ready), f"{moment}: the run was over before it could be killed"
        assert not (directory / "result.json").exists()
    train(model_config, config, dataset, None, directory, device="cpu")
    assert_same_run(directory, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_until_it_is_done(model_config, config, dataset, directory, whole, seed):
    delays = random.Random(seed)
    for _ in range(30):
        (process,) = start([Job(directory, config)], model_config, dataset)
        # Counted from a sign of life, so that it is not always the imports that are killed.
        signs = len(list(directory.rglob("*")))
        kill_when(process, lambda signs=signs: len(list(directory.rglob("*"))) != signs)
        if (directory / "result.json").exists():
            break
        (process,) = start([Job(directory, config)], model_config, dataset)
        end = time.monotonic() + delays.uniform(3, 8)
        kill_when(process, lambda end=end: time.monotonic() > end)
        if (directory / "result.json").exists():
            break
    train(model_config, config, dataset, None, directory, device="cpu")
    assert_same_run(directory, whole)
