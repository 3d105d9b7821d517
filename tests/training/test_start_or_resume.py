"""Whole runs on one process: they learn, stop, resume to the bit, and refuse what is not theirs."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from intarsia.checkpoints.native import load_model
from intarsia.data import load_tokenizer
from intarsia.errors import CheckpointError, ConfigError, TrainingError
from intarsia.training import NGrams, RunDirectory, evaluate, train
from intarsia.training.muon import Muon
from support.training_runs import Interrupt, assert_same_run, metrics_of


def test_a_run_learns_and_leaves_everything_in_its_directory(
    run, model_config, dataset, train_config, directory
):
    config = train_config.replace(steps=60, qk_clip=None, eval_every=None, eval_documents=None)
    result = train(
        model_config,
        config,
        dataset,
        load_tokenizer(dataset.directory / "tokenizer"),
        directory,
        device="cpu",
    )
    assert result.finished
    assert result.step == 60
    assert result.tokens == config.tokens
    losses = [line["loss"] for line in metrics_of(directory) if line["kind"] == "train"]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(dataset.vocab_size), rel=0.1)
    # Better than to know the frequencies of letters.
    assert (
        result.evaluation.bits_per_byte < NGrams.count(dataset.train).unigram(dataset.heldout).bits_per_byte
    )

    model = load_model(result.model_directory)
    again = evaluate(model, dataset.heldout, length=config.length)
    assert again.nll.tolist() == result.evaluation.nll.tolist()
    assert load_tokenizer(result.model_directory / "tokenizer").vocab_size == dataset.vocab_size
    assert (
        json.loads((directory / "result.json").read_text())["evaluation"]["documents"]
        == dataset.heldout.documents
    )


def test_metrics(run, train_config, directory):
    run(train_config.replace(log_every=3, eval_every=4))
    lines = metrics_of(directory)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 3),
        ("eval", 4),
        ("train", 6),
        ("eval", 8),
        ("train", 9),
        ("train", 12),
        ("eval", 12),
    ]
    first = lines[0]
    assert first["tokens"] == 3 * 4 * 48
    assert first["lr"] == pytest.approx(1e-2)
    assert first["clipped_heads"] > 0
    assert first["max_logit"] > train_config.qk_clip
    assert len({line["batches"] for line in lines if line["kind"] == "train"}) == 4


def test_a_line_is_the_mean_since_the_line_before(run, train_config, directory, tmp_path):
    run(train_config)
    run(train_config.replace(log_every=5), tmp_path / "coarse")
    fine = [line["loss"] for line in metrics_of(directory) if line["kind"] == "train"]
    coarse = [line["loss"] for line in metrics_of(tmp_path / "coarse") if line["kind"] == "train"]
    assert coarse == pytest.approx([sum(fine[0:5]) / 5, sum(fine[5:10]) / 5, sum(fine[10:12]) / 2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 5, 7])
def test_interrupted_and_resumed_is_never_interrupted(run, train_config, directory, tmp_path, number, step):
    config = train_config.replace(log_every=2)
    run(config, tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupt = Interrupt(step, number)
    result = run(config, progress=interrupt)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not result.finished
    assert result.step == step
    assert any("Ctrl-C again" in note for note in interrupt.notes)
    assert not (directory / "result.json").exists()
    # The checkpoint of step 4 may be there as well; metrics beyond the newest are done again.
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99, "loss": 1.0}\n{"kind": "tra')
    assert run(config, resume="always").finished
    assert_same_run(directory, tmp_path / "whole")


def test_an_older_checkpoint_will_do(run, train_config, directory, tmp_path):
    run(train_config, tmp_path / "whole")
    run(train_config, progress=Interrupt(10))
    shutil.rmtree(directory / "checkpoints" / "step-000010")
    run(train_config)
    assert_same_run(directory, tmp_path / "whole")


def test_without_a_checkpoint_a_run_starts_again(run, train_config, directory, tmp_path):
    run(train_config, tmp_path / "whole")
    run(train_config, progress=Interrupt(3))
    shutil.rmtree(directory / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        run(train_config, resume="always")
    run(train_config)
    assert_same_run(directory, tmp_path / "whole")


def test_a_second_ctrl_c_ends_at_once(run, train_config, directory):
    with pytest.raises(KeyboardInterrupt):
        run(train_config, progress=Interrupt(3, signal.SIGINT, times=2))
    assert not (directory / "checkpoints" / "step-000003").exists()
    assert run(train_config).finished


def test_precision_checkpointing_and_adamw_resume_to_the_bit_too(run, train_config, directory, tmp_path):
    config = train_config.replace(
        precision="bf16", muon_precision="bf16", activation_checkpointing=True, micro_rows=2, optimizer="muon"
    )
    for name, each in {"muon": config, "adamw": config.replace(optimizer="adamw", schedule="cosine")}.items():
        run(each, tmp_path / f"{name}-whole")
        run(each, tmp_path / name, progress=Interrupt(6))
        run(each, tmp_path / name)
        assert_same_run(tmp_path / name, tmp_path / f"{name}-whole")


def test_a_finished_run_is_not_done_again(run, train_config, directory):
    first = run(train_config)
    shutil.rmtree(directory / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != "config.json"}
    second = run(train_config)
    assert (second.step, second.batches, second.loss) == (first.step, first.batches, first.loss)
    assert second.evaluation.bits_per_byte == first.evaluation.bits_per_byte
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_run_is_not_resumed(run, model_config, dataset, train_config, directory):
    run(train_config, progress=Interrupt(3))
    with pytest.raises(CheckpointError) as caught:
        run(train_config.replace(lr=0.5, seed=3))
    assert "train.lr: 0.01 in the run, 0.5 now" in str(caught.value)
    assert "train.seed: 0 in the run, 3 now" in str(caught.value)
    assert "train.steps" not in str(caught.value)
    wider = model_config.replace(d_model=32)
    with pytest.raises(CheckpointError, match=r"model.d_model: 24 in the run, 32 now"):
        train(wider, train_config, dataset, None, directory, device="cpu")
    with pytest.raises(CheckpointError, match="holds a run already"):
        run(train_config, resume="never")


def test_other_data_are_not_resumed(run, model_config, dataset, train_config, directory, tmp_path):
    from intarsia.data import open_corpus, open_tokenizer, prepare

    run(train_config, progress=Interrupt(3))
    (tmp_path / "a.txt").write_text("another text " * 200)
    (tmp_path / "b.txt").write_text("one more text " * 200)
    other = prepare(
        open_corpus(tmp_path / "*.txt"), open_tokenizer("bytes"), tmp_path / "tokens", progress=False
    )
    with pytest.raises(CheckpointError, match=r"data.fingerprint: "):
        train(model_config, train_config, other, None, directory, device="cpu")


def test_what_changes_no_mathematics_may_change(run, train_config, directory):
    run(train_config, progress=Interrupt(3))
    result = run(train_config.replace(micro_rows=1, checkpoint_every=None, activation_checkpointing=True))
    assert result.finished


def test_checkpoints_are_kept_in_the_number_that_was_asked_for(run, train_config, directory):
    run(train_config.replace(checkpoint_every=2, keep_checkpoints=3))
    assert sorted(os.listdir(directory / "checkpoints")) == ["step-000006", "step-000008", "step-000010"]


def test_two_processes_do_not_run_in_one_directory(run, train_config, directory):
    with RunDirectory(directory).locked(), pytest.raises(CheckpointError, match="another process is at work"):
        run(train_config)
    assert not (directory / "config.json").exists()
    assert run(train_config).finished


def test_weights_that_are_not_finite_replace_no_checkpoint(run, train_config, directory):
    steps = itertools.count(1)

    def poison(optimizer, arguments, options):
        if isinstance(optimizer, Muon) and next(steps) == 6:
            optimizer.param_groups[0]["params"][0].data[0, 0] = float("inf")

    hook = register_optimizer_step_post_hook(poison)
    try:
        with pytest.raises(TrainingError, match=r"the weights after step 6 are not finite.*step-000003"):
            run(train_config.replace(checkpoint_every=3))
    finally:
        hook.remove()
    assert os.listdir(directory / "checkpoints") == ["step-000003"]


def test_a_last_update_that_does_harm_is_found_too(run, train_config, directory):
    with pytest.raises(TrainingError, match=r"held-out text after step 1 is not finite"):
        run(train_config.replace(steps=1, lr=1e38, warmup_steps=0))
    assert not (directory / "result.json").exists()


def test_divergence_names_the_step_and_keeps_the_checkpoint(run, train_config, directory):
    # The learning rate falls upon the weights after the checkpoint of step 4: it is warming up.
    config = train_config.replace(lr=1e36, warmup_steps=11, grad_clip=None, checkpoint_every=1, qk_clip=None)
    with pytest.raises(TrainingError, match=r"of step \d+ is (nan|inf)") as caught:
        run(config)
    kept = sorted((directory / "checkpoints").iterdir())[-1]
    assert str(kept) in str(caught.value)
    assert "learning rate" in str(caught.value)
    assert not (directory / "result.json").exists()


def test_a_damaged_checkpoint_is_named(run, train_config, directory):
    run(train_config, progress=Interrupt(3))
    (tensors,) = (directory / "checkpoints" / "step-000003").glob("*.distcp")
    tensors.write_bytes(tensors.read_bytes()[:1000])
    with pytest.raises(
        CheckpointError, match=r"step-000003 is damaged: __0_0.distcp has 1,000 bytes and should"
    ):
        run(train_config)


def test_what_does_not_fit_together_is_refused(run, model_config, dataset, train_config, directory):
    with pytest.raises(ConfigError, match="vocabulary"):
        train(model_config.replace(vocab_size=200), train_config, dataset, None, directory, device="cpu")
    with pytest.raises(ConfigError, match="resume must be"):
        run(train_config, resume="perhaps")
    with pytest.raises(ConfigError, match="unknown device"):
        train(model_config, train_config, dataset, None, directory, device="abacus")
    assert not directory.exists()


def test_tensorboard(run, train_config, directory):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = train_config.replace(tensorboard=True)
    run(config, progress=Interrupt(6))
    run(config)
    read = events.EventAccumulator(str(directory / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in read.Scalars("eval/bits_per_byte")] == [5, 10, 12]


def test_the_callers_random_numbers_are_left_alone(run, train_config):
    import torch

    torch.manual_seed(1)
    before = torch.get_rng_state()
    run(train_config)
    assert torch.equal(torch.get_rng_state(), before)
