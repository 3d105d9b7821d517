"""A trained model becomes sparse in two stages, which go on to the bit wherever they were stopped."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from intarsia.checkpoints.native import load_model, save_model
from intarsia.checkpoints.opening import load_config, save
from intarsia.data import load_tokenizer
from intarsia.errors import CheckpointError, ConfigError
from intarsia.mixers import AttentionConfig
from intarsia.model import FeedForwardConfig, LanguageModel, ModelConfig
from intarsia.model.sparsified import reading_everything, sparsified
from intarsia.training import NoProgress, TrainConfig
from intarsia.training.beginning import Beginning
from intarsia.training.sparsify import sparsify
from support.training_runs import Interrupt, assert_same_run

WARM_UP = TrainConfig(
    steps=8, rows=4, length=48, lr=1e-2, trains="indexers", log_every=3, checkpoint_every=3, eval_documents=0
)
SPARSE = TrainConfig(steps=8, rows=4, length=48, lr=1e-3, log_every=3, checkpoint_every=3, eval_documents=5)


class StopBefore(NoProgress):
    """Raises KeyboardInterrupt when a stage begins."""

    def __init__(self, label: str) -> None:
        self.label = label

    def begin(self, label: str, total: int, done: int = 0) -> None:
        if label == self.label:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def teacher(model_config, dataset, tmp_path_factory):
    """A model that was not trained much: what matters here is that it stays what it is."""
    folder = tmp_path_factory.mktemp("teacher")
    model = LanguageModel(model_config)
    model.init_weights(3)
    save_model(folder, model, load_tokenizer(dataset.directory / "tokenizer"))
    return folder


@pytest.fixture
def run(teacher, model_config, dataset):
    def run(directory, progress=None, **changes):
        options = {"warm_up": WARM_UP, "sparse": SPARSE, **changes}
        model = sparsified(model_config, "dsa", 8)
        return sparsify(teacher, model, dataset, None, directory, device="cpu", progress=progress, **options)

    return run


def test_a_model_becomes_sparse_and_stops_anywhere_without_a_trace(run, teacher, tmp_path):
    whole = run(tmp_path / "whole")
    assert whole.finished
    assert set(whole.picked_share) == {"warm_up", "sparse"}
    # Before anything but the indexers has learned only they differ from the model of before.
    before, warmed = load_model(teacher), load_model(whole.directory.warm_up.model)
    for name, weight in warmed.state_dict().items():
        assert "indexer" in name or torch.equal(weight, before.state_dict()[name]), name
    assert len(before.state_dict()) < len(warmed.state_dict())
    scores = (whole.before, whole.warmed_up, whole.sparse.evaluation)
    assert len({tuple(score.documents) for score in scores}) == 1
    assert len({score.bits_per_byte for score in scores}) == 3
    assert not whole.sparse.model_directory.samefile(whole.directory.warm_up.model)
    again = run(tmp_path / "whole")
    assert again.finished
    assert again.before.nll.tolist() == whole.before.nll.tolist()

    place = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(place, StopBefore("Warm-up"))
    assert not run(place, Interrupt(4)).finished  # within the warm-up, between two lines
    with pytest.raises(KeyboardInterrupt):
        run(place, StopBefore("Sparse"))  # between the stages
    stopped = run(place, Interrupt(5))
    assert not stopped.finished
    assert stopped.sparse.step == 5
    assert run(place).finished
    assert_same_run(place / "train", tmp_path / "whole" / "train")
    assert_same_run(place / "warm-up", tmp_path / "whole" / "warm-up")


def test_another_plan_does_not_go_on(run, tmp_path, model_config, dataset, teacher):
    run(tmp_path / "a", Interrupt(2))
    with pytest.raises(CheckpointError, match="index_heads"):
        sparsify(
            teacher, sparsified(model_config, "dsa", 8, {"index_heads": 1}), dataset, None, tmp_path / "a",
            warm_up=WARM_UP, sparse=SPARSE, device="cpu",
        )  # fmt: skip
    with pytest.raises(CheckpointError, match="lr"):
        run(tmp_path / "a", warm_up=WARM_UP.replace(lr=1.0))


def test_what_does_not_fit_is_told_before_anything_is_written(run, tmp_path, dataset, model_config, teacher):
    place = tmp_path / "b"
    with pytest.raises(ConfigError, match="trains is 'all' in the warm-up"):
        run(place, warm_up=SPARSE)
    with pytest.raises(ConfigError, match="no held-out text"):
        run(place, sparse=SPARSE.replace(eval_documents=0))
    other = sparsified(model_config.replace(d_model=12), "dsa", 8)
    with pytest.raises(CheckpointError, match="not those of the model"):
        sparsify(teacher, other, dataset, None, place, warm_up=WARM_UP, sparse=SPARSE)
    with pytest.raises(CheckpointError, match="holds no weights"):
        sparsify(
            tmp_path, sparsified(model_config, "dsa", 8), dataset, None, place, warm_up=WARM_UP, sparse=SPARSE
        )
    assert not place.exists()


def test_a_run_begins_with_a_models_weights_and_knows_them_again(model_config, teacher, dataset, tmp_path):
    from intarsia.training import train

    config = SPARSE.replace(steps=2)
    with pytest.raises(ConfigError, match="not both"):
        train(
            model_config, config, dataset, None, tmp_path / "a", parent=object(), beginning=Beginning(teacher)
        )
    train(model_config, config, dataset, None, tmp_path / "a", device="cpu", beginning=Beginning(teacher))
    record = json.loads((tmp_path / "a" / "config.json").read_text())
    assert record["beginning"] == Beginning(teacher).record
    with pytest.raises(CheckpointError, match=r"beginning\.weights"):
        train(model_config, config, dataset, None, tmp_path / "a", device="cpu")


@pytest.mark.parametrize("kind", ["dsa", "qsa", "msa"])
def test_layers_keep_their_options_and_get_an_indexer(model_config, kind):
    attention = AttentionConfig(4, 6, 2, rope=1 / 3, qk_norm="head", output_gate=True)
    config = model_config.replace(
        layout="kda*2 attention mla",
        depth=4,
        mixers={**model_config.mixers, "attention": attention},
        norm_placement={"attention": "after", "mla": "after"},
    )
    made = sparsified(config, kind, 20)
    name = "mla" if kind == "dsa" else "attention"
    assert made.layers == tuple(kind if layer == name else layer for layer in config.layers)
    assert made.norm_placement[kind] == "after"
    for field in dataclasses.fields(config.mixers[name]):
        assert getattr(made.mixers[kind], field.name) == getattr(config.mixers[name], field.name)
    assert made.mixers[kind].build(8).memory.growing
    assert not made.mixers[kind].dense
    assert reading_everything(made, True).mixers[kind].dense
    with pytest.raises(ConfigError, match="no such layer"):
        sparsified(
            made.replace(layout="kda", mixers={"kda": made.mixers["kda"]}, norm_placement="before"), kind, 20
        )


def test_options_that_cannot_be_are_told(model_config):
    with pytest.raises(ConfigError, match="can become dsa"):
        sparsified(model_config, "moba", 8)
    with pytest.raises(ConfigError, match="at least one"):
        sparsified(model_config, "dsa", 0)
    with pytest.raises(ConfigError, match="num_heads is the layer's own"):
        sparsified(model_config, "dsa", 8, {"num_heads": 2})
    with pytest.raises(ConfigError, match="unknown option"):
        sparsified(model_config, "dsa", 8, {"index_headz": 2})
    assert sparsified(model_config, "dsa", 10, {"index_pool": 4}).mixers["dsa"].top_k == 8


def test_a_published_checkpoint_becomes_sparse(dataset, tmp_path):
    config = ModelConfig(
        vocab_size=dataset.vocab_size, d_model=24, depth=2, layout="attention",
        mixers={"attention": AttentionConfig(4, 6, 2)}, feed_forward=FeedForwardConfig(33),
        norm_eps=1e-6,
    )  # fmt: skip
    model = LanguageModel(config)
    model.init_weights(3)
    save(model, tmp_path / "theirs", "granitemoehybrid")
    read = load_config(tmp_path / "theirs")
    for kind in ("qsa", "msa"):
        made = sparsify(
            tmp_path / "theirs", sparsified(read, kind, 8), dataset, None, tmp_path / kind, device="cpu",
            warm_up=WARM_UP.replace(steps=2), sparse=SPARSE.replace(steps=2, eval_documents=1),
        )  # fmt: skip
        assert made.finished
        assert load_model(made.sparse.model_directory).config.layers == (kind, kind)
