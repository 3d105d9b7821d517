"""flash-linear-attention's short convolution and gated norm against what PyTorch computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.integrations import fla
from support.fla_loops import close

N, T, D, W = 3, 20, 6, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None) -> Tensor:
    """`[N, T, D]`, with the `W - 1` inputs before the first in `before` `[N, D, W - 1]`."""
    past = x.new_zeros(x.shape[0], D, W - 1) if before is None else before
    return F.conv1d(torch.cat([past, x.mT], -1), weight[:, None], bias, groups=D).mT


@pytest.mark.parametrize("shape", [(N, D), (N, 1, D), (1, N, D)])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("more", [False, True])
def test_one_token_a_sequence(shape: tuple[int, ...], activation: str | None, more: bool) -> None:
    x, weight, cache = normal(N, 1, D), normal(D, W, seed=1), normal(N, D, W, seed=2)
    bias, residual = (normal(D, seed=3), normal(N, D, seed=4)) if more else (None, None)
    expected = convolved(x, weight, bias, cache[..., 1:])[:, 0]
    expected = (expected if activation is None else F.silu(expected)) + (0 if residual is None else residual)
    kept = torch.cat([cache[..., 1:], x.mT], -1)
    y, returned = fla.causal_conv1d_update(
        x.view(shape), cache, None if residual is None else residual.view(shape), weight, bias, activation
    )
    close(y, expected.view(shape))
    close(cache, kept)
    assert returned is cache


def test_channels_in_several_dimensions() -> None:
    x, weight = normal(N, T, D), normal(D, W, seed=1)
    y, state = fla.causal_conv1d(
        x.view(N, T, 2, 3), weight, residual=x.view(N, T, 2, 3), output_final_state=True
    )
    assert y.shape == (N, T, 2, 3)
    close(y.flatten(2), convolved(x, weight, None) + x)
    close(state, x[:, -W:].mT)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_channels_first(activation: str | None) -> None:
    x, weight, bias = normal(N, T, D), normal(D, W, seed=1), normal(D, seed=2)
    before = normal(N, D, W - 1, seed=3)
    expected = convolved(x, weight, bias, before)
    expected = expected if activation is None else F.silu(expected)
    room = torch.empty(N, D, W - 1, dtype=torch.float64)
    y, state = fla.causal_conv1d_fn(
        x.mT, weight, bias, initial_states=before, return_final_states=True, final_states_out=room,
        activation=activation,
    )  # fmt: skip
    close(y, expected.mT)
    close(state, x[:, -W + 1 :].mT)
    assert state is room


def test_channels_first_with_numbered_sequences() -> None:
    x, weight = normal(2, T, D), normal(D, W, seed=1)
    numbers = torch.tensor([[0] * 5 + [1] * 15, [1] * 18 + [2, 3]])
    y = fla.causal_conv1d_fn(x.mT, weight, seq_idx=numbers).mT
    for row, lengths in ((0, [5, 15]), (1, [18, 1, 1])):
        parts = [convolved(part, weight, None) for part in x[row : row + 1].split(lengths, dim=1)]
        close(y[row : row + 1], torch.cat(parts, 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_module_of_the_convolution(bias: bool, grad: bool) -> None:
    conv = fla.ShortConvolution(D, W, bias=bias, dtype=torch.float64)
    assert {n: list(p.shape) for n, p in conv.named_parameters()} == (
        {"weight": [D, 1, W]} | ({"bias": [D]} if bias else {})
    )
    x, weight = normal(N, T, D), conv.weight.squeeze(1)
    expected = F.silu(convolved(x, weight, conv.bias))
    with torch.set_grad_enabled(grad):
        close(conv(x)[0], expected)
        y, cache = conv(x[:, :7], output_final_state=True)
        for t in range(7, T):
            one, cache = conv(x[:, t : t + 1], cache=cache, output_final_state=True)
            y = torch.cat([y, one], 1)
        close(y, expected)
        close(cache, x[:, -W:].mT)
        row, edges = x.reshape(1, N * T, D), torch.arange(N + 1) * T
        close(conv(row, cu_seqlens=edges)[0].view(N, T, D), expected)
        ones, _ = conv(x[:1], cache=None, cu_seqlens=torch.arange(T + 1))
        close(ones, F.silu(convolved(x[0][:, None], weight, conv.bias)).transpose(0, 1))
        mask = torch.ones(N, T)
        mask[1, 15:] = 0
        given = x.clone()
        close(conv(given, mask=mask)[0], F.silu(convolved(x * mask[..., None], weight, conv.bias)))
        assert torch.equal(given, x)


def test_a_cache_is_changed_in_place_only_where_nothing_is_recorded() -> None:
    conv, cache = fla.ShortConvolution(D, W, dtype=torch.float64), normal(N, D, W)
    before = cache.clone()
    _, new = conv(normal(N, 1, D, seed=5), cache=cache, output_final_state=True)
    assert torch.equal(cache, before)
    with torch.no_grad():
        _, same = conv(normal(N, 1, D, seed=5), cache=cache, output_final_state=True)
    assert same is cache
    close(same, new)
    assert conv.state_size == D * W


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_the_gated_norm(activation: str, affine: bool, residual: bool) -> None:
    norm = fla.FusedRMSNormGated(
        D, affine, eps=1e-3, activation=activation, dtype=torch.float64 if affine else None
    )
    if affine:
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x, g, r = normal(N, T, D), normal(N, T, D, seed=2), normal(N, T, D, seed=3) if residual else None
    total = x if r is None else x + r
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (norm.weight if affine else 1)
    expected = expected * (torch.sigmoid(g) if activation == "sigmoid" else F.silu(g))
    close(norm(x, g, r), expected)
    y, kept = norm(x, g, r, prenorm=True)
    close(y, expected)
    close(kept, total)
    if affine:
        norm.reset_parameters()
        assert (norm.weight == 1).all()


def test_the_gated_norm_in_16_bits() -> None:
    norm = fla.FusedRMSNormGated(D)
    x, g = normal(N, T, D).bfloat16(), normal(N, T, D, seed=2).bfloat16()
    y, kept = norm(x, g, x, prenorm=True)
    assert (y.dtype, kept.dtype) == (torch.bfloat16, torch.bfloat16)
    assert norm(x, g, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    exact = fla.rms_norm_gated(x.double(), g.double(), None, residual=x.double(), eps=norm.eps)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-8)


def test_a_bias_stands_before_the_gate() -> None:
    x, g, bias = normal(N, D), normal(N, D, seed=1), normal(D, seed=2)
    for activation, gate in (("swish", F.silu(g)), ("sigmoid", torch.sigmoid(g))):
        expected = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() + bias) * gate
        close(fla.rms_norm_gated(x, g, None, bias, activation), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fla.causal_conv1d(normal(1, 3, D)), UnsupportedError, "torch.ones"),
        (lambda: fla.causal_conv1d(normal(1, 3, D), normal(D, W), backend="cudnn"), ConfigError, "backend"),
        (lambda: fla.causal_conv1d(normal(1, 3, D), normal(D, W), activation="gelu"), ConfigError, "gelu"),
        (lambda: fla.causal_conv1d_update(normal(2, D), normal(2, D, W)), UnsupportedError, "torch.ones"),
        (lambda: fla.causal_conv1d_update(normal(2, D), normal(3, D, W), weight=normal(D, W)), ShapeError, "one token"),
        (lambda: fla.ShortConvolution(D, W, activation="gelu"), ConfigError, "gelu"),
        (lambda: fla.ShortConvolution(D, W, dilation=2), TypeError, "dilation"),
        (lambda: fla.ShortConvolution(D, W)(normal(1, 3, D), mask=torch.ones(1, 3), cu_seqlens=torch.tensor([0, 3])),
         ConfigError, "padding"),
        (lambda: fla.causal_conv1d_fn(normal(1, D, 3), normal(D, W), seq_idx=torch.zeros(1, 2)), ShapeError, "seq_idx"),
        (lambda: fla.causal_conv1d_fn(normal(1, D, 3), normal(D, W), seq_idx=torch.zeros(1, 3),
                                      return_final_states=True), ConfigError, "seq_idx"),
        (lambda: fla.FusedRMSNormGated(D, activation="gelu"), ConfigError, "gelu"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_says_so(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
