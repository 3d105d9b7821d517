"""What the layers of flash-linear-attention need beside their rules, against plain formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.integrations.fla import modules
from support.fla_loops import close

N, T, D = 2, 11, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed(x: Tensor, eps: float, rms: bool) -> Tensor:
    x = x if rms else x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("more", [False, True])
def test_norms(rms: bool, groups: int, more: bool) -> None:
    x, weight, bias = normal(N, T, D), normal(D, seed=1), normal(D, seed=2)
    residual = normal(N, T, D, seed=3) if more else None
    total = x if residual is None else x + residual
    expected = normed(total.unflatten(-1, (groups, -1)), 1e-3, rms).flatten(-2)
    expected = expected * weight + bias if more else expected
    args = (x, weight if more else None, bias if more else None, residual, 1e-3)
    for function in (modules.layer_norm, modules.group_norm):
        close(function(*args, is_rms_norm=rms, num_groups=groups), expected)
    y, kept = modules.layer_norm(*args, prenorm=True, is_rms_norm=rms, num_groups=groups)
    close(y, expected)
    close(kept, total)
    if rms and groups == 1:
        close(modules.rms_norm(*args), expected)
        close(modules.rms_norm(x, weight, None, eps=1e-3), normed(x, 1e-3, True) * weight)


@pytest.mark.parametrize("residual", [False, True])
def test_norms_before_a_linear_map(residual: bool) -> None:
    x, g, weight, bias = normal(N, T, D), normal(N, T, D, seed=1), normal(D, seed=2), normal(D, seed=3)
    linear, shift = normal(5, D, seed=4), normal(5, seed=5)
    r = normal(N, T, D, seed=6) if residual else None
    total = x if r is None else x + r
    for rms, function in ((False, modules.layer_norm_linear), (True, modules.rms_norm_linear)):
        y = function(x, weight, bias, linear, shift, r)
        close(y, (normed(total, 1e-5, rms) * weight + bias) @ linear.mT + shift)
        close(function(x, weight, bias, linear, shift, r, prenorm=True)[1], total)
    y = modules.rms_norm_swish_gate_linear(x, g, weight, bias, linear, shift, r)
    close(y, (normed(total, 1e-6, True) * weight + bias) * F.silu(g) @ linear.mT + shift)
    close(modules.rms_norm_swish_gate_linear(x, g, weight, bias, linear, shift, r, prenorm=True)[1], total)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_the_norm_of_mamba_2(before: bool, group: int | None, gated: bool, rms: bool) -> None:
    x, weight, z = normal(N, T, D), normal(D, seed=1), normal(N, T, D, seed=2) if gated else None
    gate: Any = 1 if z is None else F.silu(z)
    y = x if before else x * gate
    expected = normed(y.unflatten(-1, (-1, group or D)), 1e-6, rms).flatten(-2) * weight
    function = modules.rmsnorm_fn if rms else modules.layernorm_fn
    close(function(x, weight, None, z, group_size=group, norm_before_gate=before),
          expected * gate if before else expected)  # fmt: skip


def test_lengths_and_activations() -> None:
    x, y, weight, bias = normal(N, T, D), normal(N, T, D, seed=1), normal(5, D, seed=2), normal(5, seed=3)
    close(modules.l2norm(x, 1e-3), x / (x.square().sum(-1, keepdim=True) + 1e-3).sqrt())
    assert modules.l2norm(x, output_dtype=torch.float32).dtype == torch.float32
    close(modules.sigmoid(x), 1 / (1 + (-x).exp()))
    close(modules.logsigmoid(x, 4.0), -(1 + (-x).exp()).log() / 4)
    close(modules.swish(x), x / (1 + (-x).exp()))
    close(modules.swiglu(x, y), x * y / (1 + (-x).exp()))
    close(modules.swiglu_linear(x, y, weight, bias), (x * y / (1 + (-x).exp())) @ weight.mT + bias)


def turned(x: Tensor, positions: list[int], angles: Tensor, interleaved: bool) -> Tensor:
    """Each pair as a complex number times `exp(i position angle)`; zero before position 0. x `[T, H, D]`."""
    R = angles.shape[0]
    part = x[..., : 2 * R]
    pairs = part.unflatten(-1, (R, 2)) if interleaved else part.unflatten(-1, (2, R)).mT
    z = torch.view_as_complex(pairs.contiguous())
    p = torch.tensor(positions, dtype=torch.float64)
    z = z * torch.polar(torch.ones(len(p), 1, R).double(), p[:, None, None] * angles)
    z = z * (p >= 0)[:, None, None]
    out = torch.view_as_real(z)
    return torch.cat([(out if interleaved else out.mT).flatten(-2), x[..., 2 * R :]], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 5, "each"])
@pytest.mark.parametrize("packed", [False, True])
def test_rotations(interleaved: bool, offset: int | str, packed: bool) -> None:
    x, angles = (
        normal(N, T, 3, 8),
        torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64),
    )  # two channels are left alone
    table = torch.arange(20, dtype=torch.float64)[:, None] * angles
    offsets = [-2, 4] if offset == "each" else [int(offset)] * 2
    given: Any = torch.tensor(offsets) if offset == "each" else offset
    lengths, row = ([T, T], x) if not packed else ([9, 13], x.reshape(1, 2 * T, 3, 8))
    cu_seqlens = torch.tensor([0, 9, 22]) if packed else None
    parts = row[0].split(lengths) if packed else x
    expected = [
        turned(part, list(range(first, first + n)), angles, interleaved)
        for part, first, n in zip(parts, offsets, lengths, strict=True)
    ]
    want = torch.cat(expected)[None] if packed else torch.stack(expected)
    options: dict[str, Any] = {"interleaved": interleaved, "seqlen_offsets": given, "cu_seqlens": cu_seqlens}
    close(modules.rotary_embedding(row, table.cos(), table.sin(), **options), want)
    mine = row.clone()
    assert modules.rotary_embedding(mine, table.cos(), table.sin(), inplace=True, **options) is mine
    close(mine, want)
    with pytest.raises(ConfigError, match="8 positions"):
        modules.rotary_embedding(row, table.cos()[:8], table.sin()[:8], **options)


def test_token_shifts() -> None:
    x, cache = normal(1, T, D), normal(2, D, seed=1)
    edges = torch.tensor([0, 4, T])
    before = torch.cat([cache[:1], x[0, :3], cache[1:], x[0, 4:-1]])
    delta, last = modules.token_shift(x, edges, cache, output_cache=True)
    close(delta, before[None] - x)
    close(last, x[0, [3, T - 1]][:, None])
    close(modules.token_shift(x), torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) - x)
    rows = normal(N, T, D, seed=2)
    close(modules.token_shift(rows, cache=cache)[:, 0], cache - rows[:, 0])
    with pytest.raises(UnsupportedError, match="empty"):
        modules.token_shift(x, torch.tensor([0, 0, T]), output_cache=True)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sunk", [False, True])
def test_one_query_a_sequence(gated: bool, scaled: bool, window: int | None, sunk: bool) -> None:
    q, k, v = normal(1, 2, 4, 8), normal(1, T, 2, 8, seed=1), normal(1, T, 2, 6, seed=2)
    g, sinks = -normal(1, T, 4, seed=3).square() if gated else None, normal(4, seed=4) if sunk else None
    o = modules.attn_decoding_one_step(
        q, k, v, g, 0.5, torch.tensor([0, 4, T]), scaled, window_size=window, sink_bias=sinks
    )
    for n, (start, end) in enumerate(((0, 4), (4, T))):
        for h in range(4):
            logits = 0.5 * k[0, start:end, h // 2] @ q[0, n, h]
            if g is not None:
                own = g[0, start:end, h] * (0.5 if scaled else 1)
                logits = logits + own.sum() - own.cumsum(0)
            seen = slice(0 if window is None else max(0, end - start - window), None)
            weights = logits[seen].exp()
            total = weights.sum() + (0 if sinks is None else sinks[h].exp())
            close(o[0, n, h], (weights / total) @ v[0, start:end, h // 2][seen])


def test_one_query_needs_to_know_its_sequence() -> None:
    x = normal(1, 2, 4, 8)
    with pytest.raises(ConfigError, match="cu_seqlens"):
        modules.attn_decoding_one_step(x, x, x)


def test_what_rwkv_7_mixes() -> None:
    x, delta = normal(N, T, D), normal(N, T, D, seed=1)
    shares = [normal(D, seed=n) for n in range(2, 8)]
    for got, share in zip(modules.fused_addcmul_rwkv7(x, delta, *shares), shares, strict=True):
        close(got, x + delta * share)
    assert modules.fused_addcmul_rwkv7(x, delta, *shares[:5])[5] is None
    a = torch.sigmoid(normal(N, T, D, seed=8))
    close(modules.fused_k_rwkv7(x, a, shares[0]), x * (1 + (a - 1) * shares[0]))
    r, k, v = (normal(N, T, 3, 4, seed=n) for n in (9, 10, 11))
    own, g, o = normal(3, 4, seed=12), normal(N, T, D, seed=13), normal(N, T, D, seed=14)
    bonus = torch.einsum("nthk,nthk,hk->nth", r, k, own)[..., None] * v
    close(modules.gate_output_correction(o, r, k, own, v, g), (o + bonus.flatten(-2)) * g)


def test_norms_and_rotations_keep_16_bits() -> None:
    x, g, weight = (
        normal(N, T, D).bfloat16(),
        normal(N, T, D, seed=1).bfloat16(),
        normal(D, seed=2).bfloat16(),
    )
    y, kept = modules.layer_norm_gated(x, g, weight, None, prenorm=True)
    assert (y.dtype, kept.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (
        modules.layer_norm_gated(x, g, weight, None, prenorm=True, residual_in_fp32=True)[1].dtype
        == torch.float32
    )
    assert modules.layer_norm(x, weight, None, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    for out in (
        y, modules.rms_norm(x, weight, None), modules.rmsnorm_fn(x, weight, None, g), modules.swiglu(x, g),
        modules.rotary_embedding(x[:, :, None], weight[:4].expand(T, 4), weight[4:8].expand(T, 4)),
    ):  # fmt: skip
        assert out.dtype == torch.bfloat16


def test_what_rwkv_7_mixes_is_rounded_once_in_16_bits() -> None:
    x, delta = (normal(N, T, D, seed=n).bfloat16().requires_grad_() for n in (0, 1))
    shares = [normal(D, seed=n).bfloat16() for n in range(2, 8)]
    mixed = modules.fused_addcmul_rwkv7(x, delta, *shares)
    sum(y.float().sum() for y in mixed if y is not None).backward()  # type: ignore[union-attr]
    total = sum(share.double() for share in shares)
    assert delta.grad is not None
    assert torch.equal(delta.grad, torch.as_tensor(total).expand(N, T, D).bfloat16())
    r, k, v, own = (normal(1, 1, 3, 4, seed=n).bfloat16() for n in (9, 10, 11, 12))
    o, g = (normal(1, 1, D, seed=n).bfloat16() for n in (13, 14))
    exact = modules.gate_output_correction(*(y.double() for y in (o, r, k, own[0, 0], v, g)))
    assert torch.equal(modules.gate_output_correction(o, r, k, own[0, 0], v, g), exact.bfloat16())
