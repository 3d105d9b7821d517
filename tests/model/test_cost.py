"""Stated costs against counted parameters, counted FLOPs and measured states."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from intarsia.model import LanguageModel, cost_of, presets

SMALL = [name for name in presets.names() if "nano" in name or "tiny" in name]


def products(function):
    """The FLOPs of products of matrices that `function` computes (fused attention is none to the counter)."""
    with FlopCounterMode(display=False) as counter:
        function()
    flops = counter.get_flop_counts()["Global"]
    return sum(count for op, count in flops.items() if "attention" not in str(op))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_parameters(name, tie):
    config = presets.get(name, tie_embeddings=tie)
    with torch.device("meta"):
        model = LanguageModel(config)
    cost = model.cost()
    assert cost.parameters == cost_of(config).parameters
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    embeddings = {id(module.weight): module.weight.numel() for module in (model.embed, model.head)}
    assert cost.embedding_parameters == sum(embeddings.values())
    assert cost.non_embedding_parameters == cost.parameters - cost.embedding_parameters
    for block, layer in zip(model.blocks, cost.layers, strict=True):
        assert layer.parameters == sum(parameter.numel() for parameter in block.parameters())
        assert layer.name == block.name


def test_active_parameters():
    dense, moe = presets.get("kimi-linear-tiny"), presets.get("kimi-linear-tiny-moe")
    cost = cost_of(dense)
    assert cost.active_parameters == cost.parameters
    assert cost_of(dense.replace(tie_embeddings=False)).active_parameters == cost.active_parameters
    cost, experts = cost_of(moe), moe.experts
    idle = experts.num_experts - experts.num_active
    assert (
        cost.parameters - cost.active_parameters
        == (moe.depth - 1) * idle * 3 * moe.d_model * experts.d_hidden
    )


@pytest.mark.parametrize("experts", [True, False])
def test_flops_of_products(make_model, tokens, experts):
    changes = {} if experts else {"experts": None}
    model = make_model(layout="mla attention mla-rope", **changes)
    cost, (B, T) = model.cost(), tokens.shape
    mixing = sum(layer.mixer.mixing_flops(T) for layer in cost.layers)
    assert products(lambda: model(tokens)) == B * T * (cost.forward_flops_per_token(T) - mixing)
    # Training is three forward passes; the loss computes its logits once more.
    again = 2 * model.head.weight.numel()
    training = products(lambda: model(tokens, targets=tokens).nll.sum().backward())
    assert training == B * T * (cost.training_flops_per_token(T) - 3 * mixing + again)


def test_flops_grow_with_the_length_where_attention_is():
    hybrid, full = (cost_of(presets.get(f"{name}-tiny")) for name in ("kimi-linear", "full"))
    growth = [
        cost.training_flops_per_token(64_000) - cost.training_flops_per_token(1_000)
        for cost in (hybrid, full)
    ]
    assert growth[1] == pytest.approx(4 * growth[0])
    assert hybrid.training_flops_per_token(100) == 3 * hybrid.forward_flops_per_token(100)


@pytest.mark.parametrize("name", ["kimi-linear-nano", "gdn-hybrid-nano", "full-nano"])
def test_state_bytes(name):
    model = LanguageModel(presets.get(name)).eval()
    model.init_weights(0)
    tokens = torch.zeros(3, 10, dtype=torch.int64)
    with torch.no_grad():
        states = model(tokens, states=model.init_states(3)).states
    assert states.nbytes() == model.cost().state_bytes(10, batch=3)
    assert model.init_states(3).nbytes() == model.cost().state_bytes(0, batch=3)
