"""A step is the same however it is cut, and stops before it does harm."""

from __future__ import annotations

import copy

import pytest
import torch

from intarsia.data import BatchLoader
from intarsia.errors import TrainingError
from intarsia.layers.side import SideResults
from intarsia.mixers.mla import LatentAttention
from intarsia.model import LanguageModel
from intarsia.training.distributed import Processes
from intarsia.training.learner import Learner, micro_batches
from intarsia.training.optimizers import build_optimizers
from intarsia.training.qk_clip import clip_logits


@pytest.fixture
def model(model_config):
    model = LanguageModel(model_config)
    model.init_weights(0)
    return model


@pytest.fixture
def batch(dataset):
    return BatchLoader(dataset.train, rows=4, length=48, seed=0).next()


def step(model, config, batch):
    return Learner(model, build_optimizers(model, config), config, Processes()).step(batch, 0)


@pytest.mark.parametrize("rows", [1, 2, 4, None])
def test_micro_batches_are_the_batch_in_pieces(batch, rows):
    parts = list(micro_batches(batch, 48, rows))
    assert len(parts) == (1 if rows is None else 4 // rows)
    assert torch.equal(torch.cat([batch.tokens[:, part] for part, _ in parts], dim=1), batch.tokens)
    assert sum((seqs.lengths for _, seqs in parts), ()) == batch.seqs.lengths
    assert all(seqs.total == part.stop - part.start for part, seqs in parts)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_does_not_change_the_mathematics(model, train_config, batch, optimizer):
    models = [model, *(copy.deepcopy(model) for _ in range(3))]
    config = train_config.replace(optimizer=optimizer)
    variants = [
        config,
        config.replace(micro_rows=1),
        config.replace(micro_rows=2),
        config.replace(activation_checkpointing=True),
    ]
    results = []
    for each, variant in zip(models, variants, strict=True):
        each.activation_checkpointing = variant.activation_checkpointing
        # In double precision, so that what is left is rounding and nothing else.
        results.append(step(each.double(), variant, batch))
    for other, result in zip(models[1:], results[1:], strict=True):
        assert result.nll == pytest.approx(results[0].nll, rel=1e-6)
        assert result.gradient_norm == pytest.approx(results[0].gradient_norm, rel=1e-6)
        for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(a.abs().max()) + 1e-9, msg=name)


def test_the_loss_is_the_mean_over_tokens_that_count(model, train_config, batch):
    batch.targets[0, :150] = -100
    with torch.no_grad():
        nll = model(batch.tokens, targets=batch.targets, seqs=batch.seqs).nll
    result = step(model, train_config.replace(micro_rows=1), batch)
    assert result.tokens == 4 * 48 - 150
    assert result.loss == pytest.approx(float(nll.sum()) / result.tokens, rel=1e-5)


def test_a_step_without_a_target_is_refused_and_changes_nothing(model, train_config, batch):
    before = copy.deepcopy(model.state_dict())
    batch.targets[:] = -100
    with pytest.raises(TrainingError, match=r"step 1 has nothing to learn from: all 192 targets are -100"):
        step(model, train_config, batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_micro_batches_without_a_target_count_for_nothing(model, train_config, batch):
    other, config = copy.deepcopy(model), train_config.replace(micro_rows=1)
    batch.targets[0, :96] = -100  # the first two of four micro-batches
    whole, cut = step(model, train_config, batch), step(other, config, batch)
    assert cut.tokens == whole.tokens == 96
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)


def test_gradients_are_clipped_to_their_norm(model, train_config, batch):
    config = train_config.replace(grad_clip=1e-3)
    result = step(model, config, batch)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert result.gradient_norm > 0.1
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_bf16_keeps_weights_gradients_and_states_in_float32(model, train_config, batch):
    optimizers = build_optimizers(model, train_config)
    config = train_config.replace(precision="bf16")
    result = Learner(model, optimizers, config, Processes()).step(batch, 0)
    exact = step(copy.deepcopy(model), train_config, batch)
    assert result.loss == pytest.approx(exact.loss, rel=0.05)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    states = [
        value for member in optimizers.members for state in member.state.values() for value in state.values()
    ]
    assert {value.dtype for value in states} == {torch.float32}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite_are_told_to_whoever_reads(model, train_config, batch, where):
    if where == "loss":
        model.norm.weight.data[0] = float("nan")
    else:
        model.blocks[0].mixer.q_proj.weight.register_hook(lambda gradient: gradient * float("inf"))
    words = {"loss": r"the loss of step 1 is nan", "gradient": r"the gradient norm of step 1 is (inf|nan)"}[
        where
    ]
    result = step(model, train_config, batch)
    assert result.tokens == batch.targets.numel()
    for number in ("nll", "loss", "gradient_norm", "max_logit"):
        with pytest.raises(TrainingError, match=words):
            getattr(result, number)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [None, 1])
def test_the_routers_are_balanced_by_the_loads_of_the_whole_step(model, train_config, batch, rows, recompute):
    model.activation_checkpointing = recompute
    batch.targets[0, :100] = -100
    with torch.no_grad():
        told = model(batch.tokens, targets=batch.targets, seqs=batch.seqs, side=("load",)).side
    load = told[1].load
    assert told[0].load is None
    assert load.sum() == 2 * (batch.targets != -100).sum()
    step(model, train_config.replace(micro_rows=rows), batch)
    router = model.blocks[1].feed_forward.router
    assert torch.equal(router.bias, router.config.bias_update_rate * (load.mean() - load).sign())


def largest_logits(model, batch):
    with torch.no_grad():
        return model(batch.tokens, seqs=batch.seqs, side=("largest_logits",)).side


def test_qk_clip_brings_the_largest_logit_to_the_threshold(model, train_config, batch):
    side = largest_logits(model, batch)
    assert side[0].largest_logits is None
    before = side[1].largest_logits
    threshold = float(before.sort().values[1])  # The largest of three heads is above it.
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    largest, clipped = clip_logits(model, side, threshold, Processes())
    assert (float(largest), int(clipped)) == (float(before.max()), 1)
    after = largest_logits(model, batch)[1].largest_logits
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-4, atol=1e-6)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed == {"blocks.1.mixer.q_proj.weight", "blocks.1.mixer.kv_up_proj.weight"}
    clip_logits(model, largest_logits(model, batch), 2 * threshold, Processes())
    torch.testing.assert_close(largest_logits(model, batch)[1].largest_logits, after, rtol=0, atol=0)
    assert clip_logits(model, [SideResults()] * 2, 1.0, Processes()) is None


class WithLoss(LatentAttention):
    """A mixer with a side result that has gradients: what an indexer that is trained beside attention will need."""

    side_results = ("loss",)

    def forward(self, x, state=None, seqs=None, side=()):
        y, state = super().forward(x, state, seqs)
        counted = self.kv_norm.weight.sum().square() * x.shape[1]
        return (y, state, SideResults(loss=counted)) if side else (y, state)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [None, 1])
def test_losses_of_layers_are_added(model, train_config, batch, rows, recompute):
    """Summed over tokens they are a mean over them in the end, like the likelihood, and change no number of it."""
    config = train_config.replace(grad_clip=None, micro_rows=rows, qk_clip=None)
    other = copy.deepcopy(model)
    other.blocks[1].mixer.__class__ = WithLoss
    other.activation_checkpointing = recompute
    plain, told = step(model, config, batch), step(other, config, batch)
    assert told.nll == pytest.approx(plain.nll, rel=1e-6)
    weight = other.blocks[1].mixer.kv_norm.weight
    expected = (
        model.blocks[1].mixer.kv_norm.weight.grad + 2 * 9
    )  # the derivative of a squared sum of nine ones
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5)
