"""Several residual streams, against their equations written out in loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.model import HyperConnectionsConfig, ModelConfig, cost_of
from intarsia.model.hyper_connections import HyperConnection
from intarsia.training.optimizers import parameter_roles
from support.streams import check_gradients, check_it_decodes_when_made_ready, gradients, logits_in_pieces

HYPER = HyperConnectionsConfig(streams=3, iterations=4, eps=1e-3)
STREAMED = {"layout": "kda mla", "hyper_connections": HYPER}


def perturbed(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("base", "scale")):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def matrices(
    w: dict[str, Tensor], x: Tensor, norm_eps: float
) -> tuple[list[float], list[float], list[list[float]]]:
    """What reads, writes and mixes the streams `[N, D]` of one token."""
    N, eps = HYPER.streams, HYPER.eps
    flat = [float(number) for stream in x for number in stream]
    size = math.sqrt(sum(v * v for v in flat) / len(flat) + norm_eps)
    raw = [sum(float(a) * v / size for a, v in zip(row, flat, strict=True)) for row in w["weight"]]
    base, scale = w["base"].tolist(), w["scale"].tolist()
    reading = [1 / (1 + math.exp(-(raw[n] * scale[0] + base[n]))) + eps for n in range(N)]
    writing = [2 / (1 + math.exp(-(raw[n] * scale[1] + base[n]))) for n in range(N, 2 * N)]
    mixing = []
    for row in range(N):
        at = [2 * N + row * N + column for column in range(N)]
        powers = [math.exp(raw[i] * scale[2] + base[i]) for i in at]
        mixing.append([power / sum(powers) + eps for power in powers])
    for step in range(2 * HYPER.iterations - 1):
        if step % 2:
            mixing = [[v / (sum(row) + eps) for v in row] for row in mixing]
        else:
            sums = [sum(row[column] for row in mixing) + eps for column in range(N)]
            mixing = [[v / s for v, s in zip(row, sums, strict=True)] for row in mixing]
    return reading, writing, mixing


def test_streams_are_read_mixed_and_written_as_the_equations_say():
    module = perturbed(HyperConnection(5, HYPER, 1e-4).double())
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 4, *shape, 5, generator=generator, dtype=torch.float64) for shape in ((3,), ()))
    h, joined = module(x)
    after = joined.with_output(y)
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        reading, writing, mixing = matrices(module.state_dict(), x[b, t], 1e-4)
        torch.testing.assert_close(
            h[b, t], sum(r * stream for r, stream in zip(reading, x[b, t], strict=True))
        )
        for n in range(3):
            mixed = sum(mixing[m][n] * x[b, t, m] for m in range(3))
            torch.testing.assert_close(after[b, t, n], mixed + writing[n] * y[b, t])


def test_the_mixture_is_nearly_doubly_stochastic():
    module = perturbed(HyperConnection(5, HyperConnectionsConfig(4, 20, 1e-6), 1e-5).double())
    ones = torch.ones(1, 1, 4, 5, dtype=torch.float64)
    _, joined = module(ones)
    torch.testing.assert_close(joined.mixed, ones, rtol=0, atol=1e-4)  # columns
    with torch.no_grad():
        _, of_units = module(torch.eye(4, 5, dtype=torch.float64)[None, None])
    rows = of_units.mixed[0, 0, :, :4].sum(0)
    torch.testing.assert_close(rows, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-4)


def test_a_model_of_streams_is_cached_recomputed_and_compiled_alike(make_model, tokens):
    model = perturbed(make_model(**STREAMED)).double()
    torch.testing.assert_close(logits_in_pieces(model, tokens), model(tokens).logits)

    plain = gradients(model, tokens)
    assert all(plain[f"blocks.1.{part}_streams.base"].abs().max() > 0 for part in ("mixer", "feed_forward"))
    model.activation_checkpointing = True
    check_gradients(model, tokens, plain)
    model.activation_checkpointing = False
    model.compile_blocks(backend="eager")
    check_gradients(model, tokens, plain)


def test_it_decodes_when_made_ready_and_keeps_float32(make_model, tokens):
    model = perturbed(make_model(**STREAMED))
    check_it_decodes_when_made_ready(model, tokens)
    narrow = model.to(torch.bfloat16)
    kept = [name for name, parameter in narrow.named_parameters() if "_streams." in name]
    assert len(kept) == 12
    assert all(narrow.get_parameter(name).dtype == torch.float32 for name in kept)


def test_costs_and_roles_are_those_of_the_parameters(make_model):
    model = make_model(**STREAMED, mixer_only=("kda",))
    cost, unbuilt = model.cost(), cost_of(model.config)
    of_streams = [p for name, p in model.named_parameters() if "_streams." in name]
    assert len(of_streams) == 9  # a block without a feed-forward has one part
    assert cost.parameters_by_part() == unbuilt.parameters_by_part()
    assert cost.parameters_by_part()["residual streams"] == sum(p.numel() for p in of_streams)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.forward_flops_per_token(64) == unbuilt.forward_flops_per_token(64)
    assert cost.parameters_read(1) == cost.active_parameters
    plain = cost_of(model.config.replace(hyper_connections=None))
    products = 2 * sum(p.numel() for p in of_streams if p.dim() == 2)
    mixed = 3 * 2 * 32 * (3 * 3 + 2 * 3)
    assert cost.forward_flops_per_token(64) - plain.forward_flops_per_token(64) == products + mixed
    roles = parameter_roles(model)
    assert roles["blocks.0.mixer_streams.weight"] == "router"
    assert roles["blocks.0.mixer_streams.base"] == "vector"
    assert ModelConfig.from_dict(model.config.to_dict()) == model.config


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hyper_connections": {"streams": 0}}, "streams"),
        ({"hyper_connections": HYPER, "norm_placement": {"kda": "after"}}, "norms before"),
    ],
)
def test_what_cannot_be_is_named(make_model, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        make_model(**changes)
