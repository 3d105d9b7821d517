"""Weights that are cast once a step give what autocast gives, and leave the model alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from intarsia.data import BatchLoader
from intarsia.layers.narrow import Narrowed, NarrowLinear
from intarsia.model import LanguageModel, presets
from intarsia.ops.precision import without_autocast
from intarsia.training.distributed import Processes
from intarsia.training.learner import Learner
from intarsia.training.optimizers import build_optimizers

VOCABULARY = 64
MODELS = {
    "linear and latent layers": presets.get("kimi-linear-nano", VOCABULARY, tie_embeddings=False),
    "biases and windows": presets.get("gpt-oss-nano", VOCABULARY, tie_embeddings=False),
    "experts": presets.get("kimi-linear-tiny-moe", VOCABULARY, tie_embeddings=False),
}


def made(config) -> LanguageModel:
    model = LanguageModel(config)
    model.init_weights(0)
    return model


def batches(count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (2, 41), generator=generator) for _ in range(count)]


def gradients(model, original, inputs):
    """Of `original`, from forward passes through `model`, which may be its narrow form; and the losses."""
    original.zero_grad()
    losses = []
    for tokens in inputs:
        with torch.autocast("cpu", torch.bfloat16):
            nll = model(tokens[:, :-1], targets=tokens[:, 1:]).nll
        nll.sum().backward()
        losses.append(nll.detach())
    return losses, {name: p.grad.clone() for name, p in original.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_losses_and_gradients_are_those_of_autocast_to_the_bit(config, recompute):
    model = made(config)
    model.activation_checkpointing = recompute
    expected = gradients(model, model, batches())
    narrowed = Narrowed(torch.bfloat16)
    narrowed.refresh()
    narrow = narrowed.of(model)
    for _ in range(2):  # the second time into the same memory
        narrowed.refresh()
        losses, found = gradients(narrow, model, batches())
        assert all(torch.equal(a, b) for a, b in zip(losses, expected[0], strict=True))
        for name, gradient in found.items():
            if name.endswith("bias"):  # summed over tokens in float32, where autocast sums in bfloat16
                assert (gradient - expected[1][name]).norm() < 2**-7 * expected[1][name].norm(), name
            elif name == "embed.weight":  # token by token, where autograd sums up each micro-batch first
                torch.testing.assert_close(gradient, expected[1][name], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(gradient, expected[1][name]), name


def test_an_embedding_that_is_the_head_too():
    model = made(presets.get("kimi-linear-nano", VOCABULARY))
    assert model.head.weight is model.embed.weight
    expected = gradients(model, model, batches())
    narrowed = Narrowed(torch.bfloat16)
    narrow = narrowed.of(model)
    narrowed.refresh()
    losses, found = gradients(narrow, model, batches())
    assert all(torch.equal(a, b) for a, b in zip(losses, expected[0], strict=True))
    # Added up in another order.
    torch.testing.assert_close(found, expected[1], rtol=1e-5, atol=1e-5)


def test_the_model_stays_as_it_is_and_its_gradients_where_they_are():
    model = made(MODELS["linear and latent layers"])
    before = copy.deepcopy(model.state_dict())
    narrowed = Narrowed(torch.bfloat16)
    narrow = narrowed.of(model)
    assert narrowed.of(model) is narrow
    assert {id(p) for p in narrow.parameters()} == {id(p) for p in model.parameters()}
    assert not any(isinstance(part, NarrowLinear) for part in model.modules())
    assert sum(isinstance(part, NarrowLinear) for part in narrow.modules()) == sum(
        type(part) is nn.Linear for part in model.modules()
    )
    where = []
    for _ in range(2):
        narrowed.refresh()
        gradients(narrow, model, batches())
        where.append(
            {
                n: model.get_submodule(n).weight.grad.data_ptr()
                for n in ("head", "embed", "blocks.0.mixer.q_proj")
            }
        )
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert where[0] == where[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_copies_are_as_new_as_the_last_refresh():
    linear = nn.Linear(8, 8)
    narrowed = Narrowed(torch.bfloat16)
    narrow, x = narrowed.of(linear), torch.randn(3, 8)
    narrowed.refresh()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = narrow(x)
        linear.weight += 1
        assert torch.equal(narrow(x), before)
        narrowed.refresh()
        assert torch.equal(narrow(x), linear(x))


def test_without_autocast_the_weights_themselves_are_read():
    linear = nn.Linear(8, 8)
    narrowed = Narrowed(torch.bfloat16)
    narrow, x = narrowed.of(linear), torch.randn(3, 8)
    narrowed.refresh()
    assert torch.equal(narrow(x), linear(x))
    with torch.autocast("cpu", torch.bfloat16), without_autocast(x):
        assert torch.equal(narrow(x), linear(x))
        narrow(x).sum().backward()
    expected = x.sum(0).expand(8, 8)
    torch.testing.assert_close(linear.weight.grad, expected)
    with torch.autocast("cpu", torch.bfloat16):
        narrow(x).sum().backward()  # added to what autograd has put there
    torch.testing.assert_close(linear.weight.grad, 2 * expected, rtol=2**-6, atol=2**-4)


def test_frozen_weights_have_no_gradient():
    linear = nn.Linear(8, 8)
    linear.weight.requires_grad_(False)
    narrowed = Narrowed(torch.bfloat16)
    narrow, x = narrowed.of(linear), torch.randn(3, 8, requires_grad=True)
    narrowed.refresh()
    with torch.autocast("cpu", torch.bfloat16):
        narrow(x).sum().backward()
    assert linear.weight.grad is None
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(3, 8), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_steps_are_those_of_autocast(monkeypatch, model_config, train_config, dataset, optimizer):
    config = train_config.replace(precision="bf16", optimizer=optimizer)
    weights = []
    for narrow in (True, False):
        if not narrow:
            monkeypatch.setattr(Learner, "_narrowed", None)
        model = made(model_config.replace(tie_embeddings=False))
        learner = Learner(model, build_optimizers(model, config), config, Processes())
        loader = BatchLoader(dataset.train, rows=4, length=48, seed=0)
        assert len({learner.step(loader.next(), done).loss for done in range(3)}) == 3
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
