"""Runs that go on with other settings, in their own directory or as a branch."""

from __future__ import annotations

import json
import shutil

import pytest

from intarsia.errors import CheckpointError, ConfigError
from intarsia.training import Parent, train
from intarsia.training.schedule import multiplier, stable_until
from support.training_runs import Interrupt, Job, assert_same_run, finish, metrics_of, start, weights_of


@pytest.fixture
def config(train_config):
    """The learning rate falls over the last two of ten steps."""
    return train_config.replace(steps=10, eval_every=None, checkpoint_every=2, keep_stable=True)


def record_of(directory):
    return json.loads((directory / "config.json").read_text())


def assert_same_training(a, b):
    """Equal weights and equal lines of metrics, but for where the data were evaluated."""
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name
    lines = [[line for line in metrics_of(d) if line["kind"] == "train"] for d in (a, b)]
    assert lines[0] == lines[1]


def test_more_steps_before_the_rate_falls(run, config, directory, tmp_path):
    longer = config.replace(steps=20)
    run(longer, tmp_path / "whole")
    run(config, progress=Interrupt(7))
    with pytest.warns(UserWarning, match=r"Going on from step 7 with train.steps 10 → 20"):
        assert run(longer).step == 20
    assert_same_run(directory, tmp_path / "whole")
    assert record_of(directory)["history"] == [{"step": 7, "changed": ["train.steps 10 → 20"]}]
    assert record_of(directory)["train"]["steps"] == 20


def test_more_steps_when_the_rate_has_fallen_are_refused(run, config, directory):
    config = config.replace(decay_fraction=0.4)
    run(config, progress=Interrupt(9))
    before = sorted(directory.rglob("*"))
    # The rate of the seventh step is the peak still, that of the eighth is not.
    assert [multiplier(config, step) for step in (6, 7)] == [1, 0.75]
    with pytest.raises(
        CheckpointError, match=r"is at step 9, and from step 8 on its learning rate"
    ) as caught:
        run(config.replace(steps=20))
    assert "train.steps: 10 in the run, 20 now" in str(caught.value)
    assert f"--from {directory}@6" in str(caught.value)
    with pytest.raises(CheckpointError, match="is at step 9 already"):
        run(config.replace(steps=9))
    assert sorted(directory.rglob("*")) == before
    assert record_of(directory)["train"]["steps"] == 10
    assert run(config).finished


def test_another_warm_up_is_refused_when_it_is_over(run, config):
    run(config, progress=Interrupt(1))
    with pytest.raises(CheckpointError, match=r"from step 1 on its learning rate was another"):
        run(config.replace(warmup_steps=4))


def test_what_is_measured_and_how_a_step_is_cut_may_change(run, config, directory, tmp_path):
    run(config.replace(log_every=5, eval_every=4), tmp_path / "whole")
    run(config, progress=Interrupt(5))
    changed = config.replace(log_every=5, eval_every=4, eval_documents=2, keep_every=4, keep_stable=False)
    with pytest.warns(UserWarning, match="train.log_every 1 → 5"):
        run(changed)
    assert_same_weights = weights_of(directory), weights_of(tmp_path / "whole")
    assert all(
        (value == assert_same_weights[1][name]).all() for name, value in assert_same_weights[0].items()
    )
    assert [line["step"] for line in metrics_of(directory) if line["kind"] == "train"] == [1, 2, 3, 4, 5, 10]
    assert [line["step"] for line in metrics_of(directory) if line["kind"] == "eval"] == [8, 10]


def test_a_branch_is_the_longer_run(run, config, directory, tmp_path):
    """From the checkpoint where the rate began to fall, that of a finished run."""
    run(config.replace(steps=20), tmp_path / "whole")
    run(config)
    assert stable_until(config) == 8
    with pytest.warns(UserWarning, match=f"Going on from step 8 of {directory} with train.steps 10 → 20"):
        run(config.replace(steps=20), tmp_path / "branch", parent=Parent(directory))
    assert_same_training(tmp_path / "branch", tmp_path / "whole")
    lineage = record_of(tmp_path / "branch")["lineage"]
    assert (lineage["run"], lineage["step"], lineage["lineage"]) == (str(directory), 8, None)
    assert lineage["changed"] == ["train.steps 10 → 20"]
    assert lineage["batches"] == metrics_of(directory)[7]["batches"]

    # The parent is not needed any more; the same call finds the branch done, and another branch is not mistaken for it.
    shutil.rmtree(directory)
    assert run(config.replace(steps=20), tmp_path / "branch", parent=Parent(directory)).step == 20
    for parent in (Parent(directory, 6), Parent(tmp_path / "other")):
        with pytest.raises(CheckpointError, match=r"holds a run already, which began from step 8 of"):
            run(config.replace(steps=20), tmp_path / "branch", parent=parent)


def test_a_decay_from_any_checkpoint_of_the_stable_phase(run, config, directory, tmp_path):
    """The rate falls from its peak over as many steps as are said; what came before is not done again."""
    run(config.replace(steps=40), progress=Interrupt(7))
    decay = config.replace(steps=11, decay_fraction=5 / 11, log_every=1)
    assert [multiplier(decay, step) for step in (5, 6, 10)] == pytest.approx([1.0, 1.0, 0.2])
    with pytest.warns(UserWarning, match="Going on from step 6") as caught:
        result = run(decay, tmp_path / "branch", parent=Parent(directory, 6))
    assert not any("rate was" in str(warning.message) for warning in caught)
    assert (result.step, result.tokens) == (11, 11 * decay.tokens_per_step)
    ours, theirs = metrics_of(tmp_path / "branch"), metrics_of(directory)
    assert ours[:6] == theirs[:6]
    assert [line["lr"] for line in ours if line["kind"] == "train"][6:] == pytest.approx(
        [config.lr * share for share in (1.0, 0.8, 0.6, 0.4, 0.2)]
    )
    # The parent goes on as if nothing had been.
    assert run(config.replace(steps=40), progress=Interrupt(9)).step == 9


def test_a_rate_that_jumps_is_told(run, config, directory, tmp_path):
    run(config)
    with pytest.warns(
        UserWarning, match=r"For a decay that begins at step 8, set decay_fraction to 0\.2"
    ) as caught:
        run(config.replace(decay_fraction=0.5), tmp_path / "branch", parent=Parent(directory, 8))
    assert "was 0.01 in the last step before and is 0.004 in the next" in str(
        [str(w.message) for w in caught]
    )


def test_other_hyperparameters_in_a_branch(run, config, directory, tmp_path):
    """The optimizers keep their state and take the new settings."""
    run(config)
    changed = config.replace(lr=1e-3, weight_decay=0.0, adamw_lr_scale=0.5, qk_clip=None, precision="bf16")
    with pytest.warns(UserWarning, match=r"train.lr 0.01 → 0.001"):
        run(changed, tmp_path / "branch", parent=Parent(directory, 6))
    lines = [line for line in metrics_of(tmp_path / "branch") if line["kind"] == "train"]
    assert lines[6]["lr"] == pytest.approx(1e-3)
    assert "max_logit" in lines[5]
    assert "max_logit" not in lines[6]
    before = weights_of(directory)
    moved = [abs(value - before[name]).max() for name, value in weights_of(tmp_path / "branch").items()]
    assert max(moved) > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 2}, r"train.rows: 4 in the run, 2 now \(another order of the data\)"),
        ({"length": 24}, "another order of the data"),
        ({"data_seed": 3}, "another order of the data"),
        ({"seed": 3}, "train.seed"),
        ({"optimizer": "adamw"}, "train.optimizer"),
    ],
)
def test_what_a_branch_cannot_change(run, config, directory, tmp_path, changes, words):
    run(config, progress=Interrupt(4))
    with pytest.raises(CheckpointError, match=words) as caught:
        run(config.replace(**changes), tmp_path / "branch", parent=Parent(directory))
    assert "Start a new run without --from" in str(caught.value)
    with pytest.raises(CheckpointError, match=words) as caught:
        run(config.replace(**changes))
    assert "need a new run, in another directory" in str(caught.value)
    assert not (tmp_path / "branch").exists()


def test_another_model_cannot_branch_off(run, model_config, dataset, config, directory, tmp_path):
    run(config, progress=Interrupt(4))
    with pytest.raises(CheckpointError, match=r"model.d_model: 24 in the run, 32 now \(another model\)"):
        train(
            model_config.replace(d_model=32), config, dataset, None, tmp_path / "branch",
            device="cpu", parent=Parent(directory),
        )  # fmt: skip


def test_parents_that_are_not_there(run, config, directory, tmp_path):
    other = tmp_path / "branch"
    with pytest.raises(CheckpointError, match="holds no training run"):
        run(config, other, parent=Parent(directory))
    run(config.replace(schedule="cosine"))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; there are: 6, 8"):
        run(config, other, parent=Parent(directory, 5))
    with pytest.raises(CheckpointError, match=r"no checkpoint from before .*run@6, .*run@8"):
        run(config, other, parent=Parent(directory))
    with pytest.raises(ConfigError, match="would end at step 8"):
        run(config.replace(steps=8), other, parent=Parent(directory, 8))
    with pytest.raises(ConfigError, match="a directory of its own"):
        run(config, directory / ".", parent=Parent(directory))
    shutil.rmtree(directory / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no checkpoint to go on from: checkpoint_every"):
        run(config, other, parent=Parent(directory))
    assert not other.exists()
    for text in ("", "run@", "run@x@"):
        with pytest.raises(ConfigError, match="RUN or RUN@STEP"):
            Parent.parse(text)
    assert Parent.parse("a@b@12") == Parent(parent_path("a@b"), 12)
    assert Parent.parse("runs/x") == Parent(parent_path("runs/x"))


def parent_path(text):
    from pathlib import Path

    return Path(text)


def test_a_branch_that_was_killed_while_it_copied(run, config, directory, tmp_path):
    run(config.replace(steps=20), tmp_path / "whole")
    run(config)
    branch = tmp_path / "branch"
    with pytest.warns(UserWarning, match="Going on"):
        run(config.replace(steps=20), branch, parent=Parent(directory), progress=None)
    # As far as a kill lets it come: the record is there, the checkpoint half.
    for name in ("result.json", "metrics.jsonl"):
        (branch / name).unlink()
    shutil.rmtree(branch / "model")
    shutil.rmtree(branch / "checkpoints")
    (branch / "checkpoints" / ".step-000008").mkdir(parents=True)
    run(config.replace(steps=20), branch, parent=Parent(directory))
    assert_same_training(branch, tmp_path / "whole")


def test_the_end_of_a_constant_rate_is_kept(run, config, directory, tmp_path):
    constant = config.replace(schedule="constant")
    run(constant.replace(steps=16), tmp_path / "whole")
    run(constant)
    assert (directory / "checkpoints" / "step-000010").is_dir()
    with pytest.warns(UserWarning, match="from step 10 of"):
        run(constant.replace(steps=16), tmp_path / "branch", parent=Parent(directory))
    assert_same_training(tmp_path / "branch", tmp_path / "whole")


def test_a_finished_run_is_not_undone(run, config, directory):
    run(config)
    with pytest.raises(CheckpointError, match=r"is finished, and was to end otherwise") as caught:
        run(config.replace(steps=20))
    assert "of the steps: 6, 8" in str(caught.value)
    assert run(config.replace(log_every=3)).step == 10


def test_which_checkpoints_are_kept(run, config, directory):
    run(config.replace(steps=20, keep_checkpoints=1, keep_every=6))
    kept = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert kept == ["step-000006", "step-000012", "step-000016", "step-000018"]


def test_two_processes_branch_off_from_one(run, model_config, dataset, config, directory, tmp_path):
    run(config.replace(steps=20), tmp_path / "whole")
    run(config)
    jobs = [
        Job(tmp_path / "branch", config.replace(steps=20), parent=directory),
        Job(tmp_path / "no-branch", config.replace(steps=20, rows=8), parent=directory),
    ]
    good, bad = finish(start(jobs, model_config, dataset, processes=2))
    assert [report["step"] for report in good] == [20, 20]
    assert [report["error"] for report in bad] == ["CheckpointError"] * 2
    losses = [
        [line["loss"] for line in metrics_of(where) if line["kind"] == "train"]
        for where in (tmp_path / "branch", tmp_path / "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][:8] == losses[1][:8]
