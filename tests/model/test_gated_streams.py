"""Several residual streams that are read through gates, against their equations written out in loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.model import HyperConnectionsConfig, ModelConfig, cost_of
from intarsia.model.gated_streams import GatedStreams, StreamNorm
from intarsia.training.optimizers import parameter_roles
from support.streams import check_gradients, check_it_decodes_when_made_ready, gradients, logits_in_pieces

HYPER = HyperConnectionsConfig(streams=3, rank=5)
STREAMED = {"layout": "gdn attention", "hyper_connections": HYPER, "zero_centered_norms": True}


def perturbed(module):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "stream" in name or "norm" in name or parameter.dim() == 1 or isinstance(module, GatedStreams):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module


def read(w: dict[str, Tensor], n: Tensor) -> tuple[list[float], list[float]]:
    """What a part is given of the normed streams `[N, D]` of one token, and how much each stream takes."""
    N, D = n.shape
    flat = [float(v) for stream in n for v in stream]
    inside = [sum(float(a) * v for a, v in zip(row, flat, strict=True)) / N for row in w["read_down.weight"]]
    inside = [v / (1 + math.exp(-v)) for v in inside]
    gates = [sum(float(a) * v for a, v in zip(row, inside, strict=True)) for row in w["read_up.weight"]]
    gated = [v / (1 + math.exp(-gate)) for gate, v in zip(gates, flat, strict=True)]
    given = [sum(gated[i * D + d] for i in range(N)) / N for d in range(D)]
    asked = [sum(float(a) * v for a, v in zip(row, flat, strict=True)) / N for row in w["write_proj.weight"]]
    return given, [2 / (1 + math.exp(-v)) for v in asked]


def test_streams_are_read_and_written_as_the_equations_say():
    module = perturbed(GatedStreams(4, 3, 5).double())
    generator = torch.Generator().manual_seed(0)
    x, n, y = (
        torch.randn(2, 3, *shape, 4, generator=generator, dtype=torch.float64) for shape in ((3,), (3,), ())
    )
    h, joined = module.enter(x, n)
    torch.testing.assert_close(module(n), h)
    after = joined.with_output(y)
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        given, writing = read(module.state_dict(), n[b, t])
        torch.testing.assert_close(h[b, t], torch.tensor(given, dtype=torch.float64))
        for i in range(3):
            torch.testing.assert_close(after[b, t, i], x[b, t, i] + writing[i] * y[b, t])


@pytest.mark.parametrize("zero_centered", [False, True])
def test_each_stream_is_normed_with_weights_of_its_own(zero_centered):
    norm = perturbed(StreamNorm(3, 4, 1e-3, zero_centered).double())
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = norm.weight.detach().view(3, 4) + (1 if zero_centered else 0)
    for row in range(2):
        for stream in range(3):
            size = math.sqrt(sum(float(v) ** 2 for v in x[row, stream]) / 4 + 1e-3)
            torch.testing.assert_close(norm(x)[row, stream], x[row, stream] / size * weight[stream])
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_a_model_of_streams_is_cached_and_recomputed_alike(make_model, tokens):
    model = perturbed(make_model(**STREAMED)).double()
    torch.testing.assert_close(logits_in_pieces(model, tokens), model(tokens).logits)

    plain = gradients(model, tokens)
    names = [f"blocks.1.{part}_streams.write_proj.weight" for part in ("mixer", "feed_forward")]
    assert all(plain[name].abs().max() > 0 for name in (*names, "output_streams.read_up.weight"))
    model.activation_checkpointing = True
    check_gradients(model, tokens, plain)


@pytest.mark.slow
def test_a_model_of_streams_is_compiled_alike(make_model, tokens):
    model = perturbed(make_model(**STREAMED)).double()
    plain = gradients(model, tokens)
    model.compile_blocks(backend="eager")
    check_gradients(model, tokens, plain)


def test_it_decodes_when_made_ready(make_model, tokens):
    model = perturbed(make_model(**STREAMED))
    check_it_decodes_when_made_ready(model, tokens)


def test_costs_and_roles_are_those_of_the_parameters(make_model):
    model = make_model(**STREAMED, mixer_only=("gdn",))
    cost, unbuilt, D = model.cost(), cost_of(model.config), model.config.d_model
    assert cost.parameters_by_part() == unbuilt.parameters_by_part()
    of_blocks = [p for name, p in model.named_parameters() if "_streams." in name and "blocks" in name]
    assert len(of_blocks) == 9  # a block without a feed-forward has one part
    assert cost.parameters_by_part()["residual streams"] == sum(p.numel() for p in of_blocks)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.forward_flops_per_token(64) == unbuilt.forward_flops_per_token(64)
    plain = cost_of(model.config.replace(hyper_connections=None))
    products = 2 * sum(p.numel() for name, p in model.named_parameters() if "_streams." in name)
    read_and_written = 3 * 4 * 3 * D + 2 * 3 * D
    assert cost.forward_flops_per_token(64) - plain.forward_flops_per_token(64) == products + read_and_written
    roles = parameter_roles(model)
    assert roles["blocks.0.mixer_streams.read_down.weight"] == "matrix"
    assert roles["blocks.0.mixer_norm.weight"] == "vector"
    assert ModelConfig.from_dict(model.config.to_dict()) == model.config


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hyper_connections": {"streams": 2, "rank": 0}}, "rank"),
        ({"hyper_connections": HYPER, "norm": "layer"}, "RMS norms"),
        ({"hyper_connections": HYPER, "norm_placement": {"kda": "after"}}, "norms before"),
    ],
)
def test_what_cannot_be_is_named(make_model, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        make_model(**changes)
