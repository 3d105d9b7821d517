"""The feed-forward against its formula in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from intarsia.errors import ConfigError
from intarsia.model import ExpertsConfig, FeedForwardConfig, InferenceModel
from intarsia.model.experts import Experts
from intarsia.model.feed_forward import ReluSquared, SwiGLU, feed_forward_of

LIMIT = 0.4


def test_swiglu():
    module = SwiGLU(8, 12).double()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, up = x @ module.gate.weight.T, x @ module.up.weight.T
    torch.testing.assert_close(module(x), (gate * gate.sigmoid() * up) @ module.down.weight.T)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_factors_of_the_gate_and_of_the_whole(make_model, tokens, weights):
    """In float64; and few tokens, of which programs have no factors: the modules are asked then."""
    config = FeedForwardConfig(12, gate_scale=0.7, scale=1.9)
    module = feed_forward_of(8, config).double()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, up = 0.7 * (x @ module.gate.weight.T), x @ module.up.weight.T
    torch.testing.assert_close(module(x), 1.9 * ((gate * gate.sigmoid() * up) @ module.down.weight.T))
    ready = InferenceModel(
        make_model(layout="kda mla", feed_forward=FeedForwardConfig(40, scale=3.0)), weights
    )
    few = ready(tokens[:, :4], ready.init_states(2), last_only=False).logits
    many = ready(tokens[:, :40], ready.init_states(2), last_only=False).logits[:, :4]
    torch.testing.assert_close(few, many, rtol=1e-3, atol=1e-3)


def test_without_a_gate():
    module = ReluSquared(8, 12).double()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up = x @ module.up.weight.T
    torch.testing.assert_close(module(x), (up * up * (up > 0)) @ module.down.weight.T)
    cost = feed_forward_of(8, FeedForwardConfig(12, activation="relu2")).cost()
    assert cost.parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("weights", [None, "int8"])
def test_few_tokens_go_through_what_has_no_gate(make_model, tokens, weights):
    """Programs of what is done to each token know SwiGLU: the modules are asked then."""
    model = make_model(layout="kda mla", feed_forward=FeedForwardConfig(40, activation="relu2"))
    ready = InferenceModel(model, weights)
    few = ready(tokens[:, :4], ready.init_states(2), last_only=False).logits
    many = ready(tokens[:, :40], ready.init_states(2), last_only=False).logits[:, :4]
    torch.testing.assert_close(few, many, rtol=1e-3, atol=1e-3)


def limited(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate = torch.where(gate > LIMIT, LIMIT, gate)
    up = torch.where(up > LIMIT, LIMIT, torch.where(up < -LIMIT, -LIMIT, up))
    return gate / (1 + torch.exp(-gate)) * up


def test_a_limit_holds_the_gate_from_above_and_up_from_both_sides():
    module = SwiGLU(8, 12, LIMIT).double()
    x = 3 * torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, up = x @ module.gate.weight.T, x @ module.up.weight.T
    assert (gate > LIMIT).any()
    assert (up.abs() > LIMIT).any()
    torch.testing.assert_close(module(x), limited(gate, up) @ module.down.weight.T)


def test_experts_have_the_same_limit_the_shared_ones_too():
    config = ExpertsConfig(num_experts=4, d_hidden=6, num_active=2, num_shared=1, limit=LIMIT)
    module = Experts(8, config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    x = torch.randn(5, 8, dtype=torch.float64, generator=generator)
    chosen, weights = module.router(x)
    expected = module.shared.down(limited(module.shared.gate(x), module.shared.up(x)))
    for token in range(5):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up = (module.gate_up[expert] @ x[token]).chunk(2)
            expected[token] += weight * (module.down[expert] @ limited(gate, up))
    torch.testing.assert_close(module(x), expected)


def clamped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate = torch.where(gate > LIMIT, LIMIT, gate)
    up = torch.where(up > LIMIT, LIMIT, torch.where(up < -LIMIT, -LIMIT, up))
    return gate / (1 + torch.exp(-1.3 * gate)) * (up + 1)


def softly(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    def tanh(x: torch.Tensor) -> torch.Tensor:
        return 1 - 2 / (torch.exp(2 * x) + 1)

    return LIMIT * tanh(gate / LIMIT) / (1 + torch.exp(-gate)) * 0.7 * tanh(up / 0.7)


OTHERS = [
    (FeedForwardConfig(40, LIMIT, "clamped", sharpness=1.3), clamped),
    (FeedForwardConfig(40, LIMIT, "situ", up_limit=0.7), softly),
]


@pytest.mark.parametrize(("config", "formula"), OTHERS, ids=["clamped", "situ"])
def test_other_gates(config, formula):
    module = feed_forward_of(8, config).double()
    x = 3 * torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, up = x @ module.gate.weight.T, x @ module.up.weight.T
    assert (gate > LIMIT).any()
    torch.testing.assert_close(module(x), formula(gate, up) @ module.down.weight.T)
    assert module.cost().parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("config", [config for config, _ in OTHERS], ids=["clamped", "situ"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_few_tokens_go_through_other_gates(make_model, tokens, config, weights):
    """Programs of what is done to each token know SwiGLU: the modules are asked then."""
    ready = InferenceModel(make_model(layout="kda mla", feed_forward=config), weights)
    few = ready(tokens[:, :4], ready.init_states(2), last_only=False).logits
    many = ready(tokens[:, :40], ready.init_states(2), last_only=False).logits[:, :4]
    torch.testing.assert_close(few, many, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_few_tokens_keep_the_limit(make_model, tokens, weights):
    """Programs of what is done to each token have no limits: the modules are asked then."""
    experts = ExpertsConfig(num_experts=4, d_hidden=16, num_active=2, limit=0.05)
    model = make_model(layout="kda mla", experts=experts, feed_forward=FeedForwardConfig(40, limit=0.05))
    ready = InferenceModel(model, weights)
    few = ready(tokens[:, :4], ready.init_states(2), last_only=False).logits
    many = ready(tokens[:, :40], ready.init_states(2), last_only=False).logits[:, :4]
    torch.testing.assert_close(few, many, rtol=1e-3, atol=1e-3)
    free = make_model(layout="kda mla", experts=dataclasses.replace(experts, limit=None))
    assert (free(tokens[:, :4]).logits - few).abs().max() > 0.05


@pytest.mark.parametrize(
    "make",
    [
        lambda: FeedForwardConfig(8, limit=0.0),
        lambda: ExpertsConfig(4, 8, 2, limit=-1.0),
        lambda: ExpertsConfig(4, 8, 2, activation="clamped", limit=0.0),
        lambda: ExpertsConfig(4, 8, 2, activation="clamped", up_limit=7.0),
        lambda: FeedForwardConfig(8, activation="situ", up_limit=-1.0),
        lambda: FeedForwardConfig(8, limit=7.0, activation="relu2"),
        lambda: FeedForwardConfig(8, gate_scale=2.0, activation="relu2", limit=None),
        lambda: ExpertsConfig(4, 8, 2, activation="relu2", limit=7.0),
    ],
)
def test_a_limit_that_cannot_be_is_named(make):
    with pytest.raises(ConfigError, match=r"limit|gate_scale"):
        make()
