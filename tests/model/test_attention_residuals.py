"""Residuals that attend to earlier layers, against their equations written out in loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.model import ExpertsConfig, HyperConnectionsConfig, ModelConfig, cost_of
from intarsia.model.attention_residuals import AttentionResidual
from intarsia.training.optimizers import parameter_roles
from support.streams import check_gradients, check_it_decodes_when_made_ready, gradients, logits_in_pieces

GROUPED = {"layout": "kda mla", "depth": 5, "attention_residuals": 2}


def perturbed(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("query"):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def mixture(module: AttentionResidual, sources: list[Tensor]) -> Tensor:
    """Of the sources `[D]` of one token."""
    scores = []
    for x in sources:
        size = math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + module.norm_eps)
        asked = zip(x.tolist(), module.weight.tolist(), module.query.tolist(), strict=True)
        scores.append(sum(v / size * w * u for v, w, u in asked))
    powers = [math.exp(score) for score in scores]
    return sum(power / sum(powers) * x for power, x in zip(powers, sources, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("begins", [False, True])
def test_sources_are_mixed_and_added_to_as_the_equations_say(begins):
    module = perturbed(AttentionResidual(5, 1e-4, begins).double())
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 4, *shape, 5, generator=generator, dtype=torch.float64) for shape in ((3,), ()))
    h, grown = module(x)
    after = grown.with_output(y)
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        torch.testing.assert_close(h[b, t], mixture(module, list(x[b, t])))
    assert after.shape[2] == (4 if begins else 3)
    torch.testing.assert_close(after[:, :, -1], y if begins else x[:, :, -1] + y)
    kept = 3 if begins else 2
    assert torch.equal(after[:, :, :kept], x[:, :, :kept])


def test_a_new_model_weighs_all_sources_alike():
    module = AttentionResidual(5, 1e-4)
    x = torch.randn(1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x)[0], x.mean(2))


def test_groups_begin_where_they_should(make_model, tokens):
    """Five layers in groups of two: the embedding, two whole groups, and one that goes on."""
    model = perturbed(make_model(**GROUPED))
    begins = [block.mixer_streams.begins for block in model.blocks]
    assert begins == [True, False, True, False, True]
    assert not any(block.feed_forward_streams.begins for block in model.blocks)
    x = model.embedded(tokens)
    counts = []
    for block in model.blocks:
        x = block(x).y
        counts.append(x.shape[2])
    assert counts == [2, 2, 3, 3, 4]


def test_it_is_cached_recomputed_and_compiled_alike(make_model, tokens):
    model = perturbed(make_model(**GROUPED)).double()
    torch.testing.assert_close(logits_in_pieces(model, tokens), model(tokens).logits)

    plain = gradients(model, tokens)
    assert all(plain[f"blocks.1.{part}_streams.query"].abs().max() > 0 for part in ("mixer", "feed_forward"))
    model.activation_checkpointing = True
    check_gradients(model, tokens, plain)
    model.activation_checkpointing = False
    model.compile_blocks(backend="eager")
    check_gradients(model, tokens, plain)


def test_it_decodes_when_made_ready(make_model, tokens):
    model = perturbed(make_model(**GROUPED))
    check_it_decodes_when_made_ready(model, tokens)


def test_costs_and_roles_are_those_of_the_parameters(make_model):
    model = make_model(**GROUPED, mixer_only=("kda",))
    cost, unbuilt = model.cost(), cost_of(model.config)
    own = [p for name, p in model.named_parameters() if "_streams." in name]
    assert len(own) == 14  # three blocks of one part, two of two
    assert cost.parameters_by_part() == unbuilt.parameters_by_part()
    assert cost.parameters_by_part()["residual streams"] == sum(p.numel() for p in own)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.forward_flops_per_token(64) == unbuilt.forward_flops_per_token(64)
    plain = cost_of(model.config.replace(attention_residuals=None))
    seen = (1, 2 + 2, 2, 3 + 3, 3)  # by mixer and feed-forward of each layer
    assert cost.forward_flops_per_token(64) - plain.forward_flops_per_token(64) == 4 * 32 * sum(seen)
    assert parameter_roles(model)["blocks.0.mixer_streams.query"] == "vector"
    assert ModelConfig.from_dict(model.config.to_dict()) == model.config


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"attention_residuals": 0}, "attention_residuals"),
        ({"attention_residuals": 2, "norm_placement": "after"}, "norms before"),
        ({"attention_residuals": 2, "hyper_connections": HyperConnectionsConfig()}, "one residual stream"),
        ({"attention_residuals": 2, "branch_scale": 0.5}, "one residual stream"),
        (
            {"experts": {"num_experts": 4, "d_hidden": 8, "num_active": 2, "latent_norm": True}},
            "d_latent is None",
        ),
    ],
)
def test_what_cannot_be_is_named(make_model, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        make_model(**changes)


def test_a_norm_of_latents_needs_some():
    with pytest.raises(ConfigError, match="d_latent is None"):
        ExpertsConfig(4, 8, 2, latent_norm=True)
