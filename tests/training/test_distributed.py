"""Two processes on one machine train the same model as one process."""

from __future__ import annotations

import json

import numpy as np
import pytest

from intarsia.training import Evaluation, train
from support.training_runs import Interrupt, Job, finish, metrics_of, start, weights_of


@pytest.fixture(scope="module")
def configs(train_config):
    return {
        "muon": train_config.replace(micro_rows=1),
        "adamw": train_config.replace(optimizer="adamw", activation_checkpointing=True),
        "bf16": train_config.replace(precision="bf16", muon_precision="bf16"),
        "divergent": train_config.replace(
            lr=1e36, warmup_steps=11, grad_clip=None, checkpoint_every=1, qk_clip=None
        ),
        "odd": train_config.replace(rows=3),
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory, model_config, dataset, configs):
    """The directories of runs by one process."""
    root = tmp_path_factory.mktemp("one")
    for name in ("muon", "adamw", "bf16"):
        train(model_config, configs[name], dataset, None, root / name, device="cpu")
    train(model_config, configs["muon"], dataset, None, root / "stopped", device="cpu", progress=Interrupt(6))
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory, model_config, dataset, configs, one):
    """The directories of runs by two processes, and what the processes reported of each."""
    root = tmp_path_factory.mktemp("two")
    jobs = [
        Job(root / "adamw", configs["adamw"]),
        Job(root / "bf16", configs["bf16"]),
        # The second process alone is told to stop, and both stop.
        Job(root / "stopped", configs["muon"], interrupt=(1, 6)),
        Job(root / "two-two", configs["muon"], copy_of=root / "stopped"),
        Job(root / "one-two", configs["muon"], copy_of=one / "stopped"),
        Job(root / "divergent", configs["divergent"]),
        Job(root / "odd", configs["odd"]),
    ]
    reports = finish(start(jobs, model_config, dataset, processes=2))
    return root, {job.directory.name: report for job, report in zip(jobs, reports, strict=True)}


def assert_close_runs(a, b):
    """Equal but for rounding: the data exactly, the curves closely, the weights nearly."""
    ours, theirs = metrics_of(a), metrics_of(b)
    assert [(line["kind"], line["step"]) for line in ours] == [
        (line["kind"], line["step"]) for line in theirs
    ]
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            tolerance = {"gradient_norm": 1e-2, "max_logit": 1e-2}.get(key, 1e-4)
            expected = pytest.approx(other[key], rel=tolerance) if isinstance(value, float) else other[key]
            assert value == expected, (line["step"], key)
    for name, value in weights_of(a).items():
        expected = weights_of(b)[name]
        # Newton–Schulz enlarges what rounding leaves in directions of almost no gradient.
        assert np.abs(value - expected).max() < 0.02 * np.abs(expected).max() + 1e-6, name


def test_the_same_curve_and_the_same_model(model_config, dataset, configs, tmp_path, one):
    """In processes that join by themselves, from torchrun's environment."""
    (reports,) = finish(start([Job(tmp_path, configs["muon"])], model_config, dataset, processes=2))
    assert reports[0] == reports[1]
    assert reports[0]["finished"]
    assert_close_runs(tmp_path, one / "muon")
    ours, theirs = (
        Evaluation.load(run / "evaluations" / "step-000012.npz") for run in (tmp_path, one / "muon")
    )
    np.testing.assert_allclose(ours.nll, theirs.nll, rtol=1e-3)
    np.testing.assert_array_equal(ours.text_bytes, theirs.text_bytes)


def test_adamw_and_recomputation(one, two):
    assert_close_runs(two[0] / "adamw", one / "adamw")


def test_bf16(one, two):
    losses = [
        [line["loss"] for line in metrics_of(root / "bf16") if line["kind"] == "train"]
        for root in (one, two[0])
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)


def test_all_stop_when_one_is_told_to(two):
    root, reports = two
    assert [report["finished"] for report in reports["stopped"]] == [False, False]
    assert [report["step"] for report in reports["stopped"]] == [6, 6]
    trainer = json.loads((root / "stopped" / "checkpoints" / "step-000006" / "trainer.json").read_text())
    assert trainer["world_size"] == 2


@pytest.mark.parametrize("name", ["two-two", "one-two"])
def test_two_processes_go_on(one, two, name):
    root, reports = two
    assert all(report["finished"] for report in reports[name])
    assert_close_runs(root / name, one / "muon")


def test_one_process_goes_on_where_two_stopped(model_config, dataset, configs, one, two):
    directory = two[0] / "stopped"
    assert train(
        model_config, configs["muon"], dataset, None, directory, resume="always", device="cpu"
    ).finished
    assert_close_runs(directory, one / "muon")


def test_all_stop_at_a_loss_that_is_not_finite(two):
    first, second = two[1]["divergent"]
    assert first == second
    assert first["error"] == "TrainingError"
    assert "of step" in first["message"]


def test_rows_that_cannot_be_shared_are_refused_by_all(two):
    assert [report["error"] for report in two[1]["odd"]] == ["ConfigError"] * 2
