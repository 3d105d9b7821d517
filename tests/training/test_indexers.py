"""Indexers learn beside the model or alone, and change nothing of what it learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from intarsia.data import BatchLoader
from intarsia.errors import ConfigError
from intarsia.mixers.attention import AttentionConfig
from intarsia.mixers.dsa import DSAConfig
from intarsia.mixers.msa import MSAConfig
from intarsia.mixers.qsa import QSAConfig
from intarsia.model import LanguageModel
from intarsia.training.distributed import Processes
from intarsia.training.indexers import indexer_parameters
from intarsia.training.learner import Learner
from intarsia.training.optimizers import build_optimizers
from support.training_runs import Interrupt, assert_same_run, metrics_of

KINDS = {
    "dsa": DSAConfig(3, 9, 8, 4, 7, index_heads=2, index_dim=6, top_k=10, rotate=True),
    "pooled dsa": DSAConfig(3, 9, 8, 4, 7, index_heads=2, index_dim=6, top_k=12, index_pool=4),
    "msa": MSAConfig(4, 6, 2, index_dim=6, index_block_size=4, index_topk_blocks=3),
    "qsa": QSAConfig(4, 6, 2, index_heads=3, index_dim=6, index_budget=12, index_ratio=4),
}


def learner_of(model_config, train_config, kind, **changes):
    mixer = dataclasses.replace(KINDS[kind], **changes)
    model = LanguageModel(model_config.replace(mixers={**model_config.mixers, "mla": mixer}))
    model.init_weights(0)
    return Learner(model, build_optimizers(model, train_config), train_config, Processes())


@pytest.mark.parametrize(
    ("kind", "optimizer", "recompute", "clip"),
    [
        ("dsa", "muon", False, None),
        ("dsa", "adamw", True, 1e-3),
        ("pooled dsa", "muon", False, 1e-3),
        ("msa", "muon", True, 1e-3),
        ("qsa", "adamw", False, 1e-3),
    ],
)
def test_an_indexers_loss_moves_indexers_alone(
    model_config, train_config, dataset, kind, optimizer, recompute, clip
):
    """Also where gradients are clipped."""
    config = train_config.replace(optimizer=optimizer, grad_clip=clip, qk_clip=None)
    batch = BatchLoader(dataset.train, rows=4, length=48, seed=0).next()
    found = {}
    for counts in (0.0, 1.0):
        learner = learner_of(model_config, config, kind, index_loss=counts)
        learner.model.activation_checkpointing = recompute
        before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
        result = learner.step(batch, 0)
        assert (result.indexer_loss is None) == (counts == 0)
        assert (result.indexer_gradient_norm > 0) == (counts > 0)
        found[counts] = result.nll, result.gradient_norm, before, learner.model.state_dict()
    (*without, before, left), (*with_loss, _, moved) = found[0.0], found[1.0]
    assert without == with_loss
    for name in before:
        changed = not torch.equal(moved[name], before[name])
        if "indexer" in name:
            assert changed or name.endswith(("k_norm.bias", "pool_places")), name
            assert torch.equal(left[name], before[name]), name
        else:
            assert torch.equal(moved[name], left[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_model_does_moves_no_indexer(model_config, train_config, dataset, kind):
    """The indexer's gradient is the same whatever the targets are."""
    batch = BatchLoader(dataset.train, rows=4, length=48, seed=0).next()
    config = train_config.replace(qk_clip=None)
    found = []
    for targets in (batch.targets, batch.targets.flip(1)):
        learner = learner_of(model_config, config, kind, index_loss=1.0)
        result = learner.step(dataclasses.replace(batch, targets=targets), 0)
        found.append((result.nll, [p.clone() for p in indexer_parameters(learner.model).values()]))
    assert found[0][0] != found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "float32") for kind in KINDS), ("dsa", "bf16")])
def test_alone_indexers_learn_what_full_attention_gives(model_config, train_config, dataset, kind, precision):
    config = train_config.replace(trains="indexers", qk_clip=None, lr=3e-2, precision=precision, steps=16)
    mixer = dataclasses.replace(KINDS[kind], dense=True, index_loss=1.0)
    # Attention of such weights looks at few tokens and not at all of them.
    sparse = model_config.replace(mixers={**model_config.mixers, "mla": mixer}, init_std=0.4)
    learner = Learner.new(sparse, config, Processes())
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    batch = BatchLoader(dataset.train, rows=4, length=48, seed=0).next()
    results = [learner.step(batch, done, watch=True) for done in range(16)]
    assert len({result.nll for result in results}) == 1  # of a model that does not change
    assert results[-1].indexer_loss < 0.7 * results[0].indexer_loss
    assert results[-1].picked_share > results[0].picked_share
    assert results[0].gradient_norm == 0 < results[0].indexer_gradient_norm
    indexers = indexer_parameters(learner.model)
    for name, tensor in learner.model.state_dict().items():
        assert name in indexers or torch.equal(tensor, before[name]), name


def test_dense_layers_attend_to_everything(model_config, train_config, dataset):
    batch = BatchLoader(dataset.train, rows=4, length=48, seed=0).next()
    plain = {
        name: getattr(KINDS["qsa"], name) for name in (f.name for f in dataclasses.fields(AttentionConfig))
    }
    full = LanguageModel(
        model_config.replace(mixers={**model_config.mixers, "mla": AttentionConfig(**plain)})
    )
    full.init_weights(0)
    expected = full(batch.tokens, seqs=batch.seqs).logits
    for dense, same in ((True, True), (False, False)):
        model = learner_of(model_config, train_config, "qsa", dense=dense).model
        model.load_state_dict(full.state_dict(), strict=False)
        got = model(batch.tokens, seqs=batch.seqs).logits
        assert torch.equal(got, expected) == same


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_tell_the_same(model_config, train_config, dataset, kind):
    batch = BatchLoader(dataset.train, rows=4, length=48, seed=0).next()
    found = []
    for compiled in (False, True):
        model = learner_of(model_config.replace(init_std=0.4), train_config, kind, index_loss=1.0).model
        if compiled:
            torch._dynamo.reset()
            model.compile_blocks("aot_eager")
        side = model(batch.tokens, batch.targets, seqs=batch.seqs, side=("loss", "divergence", "picked")).side
        told = next(each for each in side if each.loss is not None)
        gradients = torch.autograd.grad(told.loss, list(indexer_parameters(model).values()))
        found.append((told.loss, told.divergence, told.picked, *gradients))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_nothing_to_train_is_told(model_config, train_config):
    config = train_config.replace(trains="indexers", qk_clip=None)
    with pytest.raises(ConfigError, match="whose indexer learns"):
        Learner.new(model_config, config, Processes())
    with pytest.raises(ConfigError, match="qk_clip"):
        train_config.replace(trains="indexers")


@pytest.mark.parametrize("trains", ["indexers", "all"])
def test_a_resumed_run_with_indexers_equals_one_that_was_not_stopped(
    model_config, train_config, dataset, run, directory, tmp_path, trains
):
    from intarsia.training import train

    mixer = dataclasses.replace(KINDS["dsa"], dense=trains == "indexers", index_loss=1.0)
    sparse = model_config.replace(mixers={**model_config.mixers, "mla": mixer})
    config = train_config.replace(trains=trains, qk_clip=None, log_every=4)
    train(sparse, config, dataset, None, tmp_path / "whole", device="cpu")
    # Between two lines: what is carried from step to step goes through the checkpoint.
    stopped = train(sparse, config, dataset, None, directory, device="cpu", progress=Interrupt(6))
    assert not stopped.finished
    train(sparse, config, dataset, None, directory, device="cpu")
    assert_same_run(directory, tmp_path / "whole")
    lines = [line for line in metrics_of(directory) if line["kind"] == "train"]
    assert {"indexer_loss", "indexer_gradient_norm", "picked_share"} <= lines[0].keys()
    assert 0 < lines[0]["picked_share"] < 1
