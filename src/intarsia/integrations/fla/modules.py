"""What the layers of flash-linear-attention compute in Triton beside their rules, in PyTorch: norms, activations,
rotations, token shifts. Names and arguments are theirs; all are differentiable.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.ops import gated_rms_norm, softmax_attention
from intarsia.ops import l2norm as unit
from intarsia.ops.precision import widen

# Norms


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-5,
    prenorm: bool = False, residual_in_fp32: bool = False, is_rms_norm: bool = False, num_groups: int = 1,
) -> Any:  # fmt: skip
    """LayerNorm or RMSNorm of `x + residual` over each of `num_groups` parts of the last dimension."""
    y = x if residual is None else widen(x) + widen(residual)
    normed = _norm(y.unflatten(-1, (num_groups, -1)), eps, is_rms_norm).flatten(-2)
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    normed = normed.to(x.dtype)
    if not prenorm:
        return normed
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    return normed, y.to(kept)


def rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-5,
    prenorm: bool = False, residual_in_fp32: bool = False,
) -> Any:  # fmt: skip
    """`layer_norm` without the mean."""
    if weight is not None and bias is None and residual is None and not prenorm:
        return gated_rms_norm(x, None, weight, eps=eps, gate=None)
    return layer_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True)


def group_norm(*args: Any, **options: Any) -> Any:
    """`layer_norm` by another name."""
    return layer_norm(*args, **options)


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, linear_weight: Tensor,
    linear_bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-5, prenorm: bool = False,
    residual_in_fp32: bool = False, is_rms_norm: bool = False, num_groups: int = 1,
) -> Any:  # fmt: skip
    """A norm, then a linear map."""
    y, kept = layer_norm(
        x, norm_weight, norm_bias, residual, eps, True, residual_in_fp32, is_rms_norm, num_groups
    )
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, kept) if prenorm else out


def rms_norm_linear(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, linear_weight: Tensor,
    linear_bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-5, prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:  # fmt: skip
    """RMSNorm, then a linear map."""
    return layer_norm_linear(
        x, norm_weight, norm_bias, linear_weight, linear_bias, residual, eps, prenorm, residual_in_fp32, True
    )


def layer_norm_gated(
    x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str = "swish",
    residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False, eps: float = 1e-6,
    is_rms_norm: bool = False,
) -> Any:  # fmt: skip
    """LayerNorm of `x + residual`, times swish or sigmoid of g."""
    y, kept = layer_norm(widen(x), weight, bias, residual, eps, True, residual_in_fp32, is_rms_norm)
    gate = torch.sigmoid(widen(g)) if activation == "sigmoid" else F.silu(widen(g))
    out = (y * gate.view(x.shape)).to(x.dtype)
    return (out, kept if residual is not None or residual_in_fp32 else kept.to(x.dtype)) if prenorm else out


def layer_norm_swish_gate_linear(
    x: Tensor, g: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, linear_weight: Tensor,
    linear_bias: Tensor | None, residual: Tensor | None = None, prenorm: bool = False,
    residual_in_fp32: bool = False, eps: float = 1e-6, is_rms_norm: bool = False,
) -> Any:  # fmt: skip
    """LayerNorm, times swish of g, then a linear map."""
    y, kept = layer_norm_gated(
        x, g, norm_weight, norm_bias, "swish", residual, True, residual_in_fp32, eps, is_rms_norm
    )
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, kept) if prenorm else out


def rms_norm_swish_gate_linear(*args: Any, **options: Any) -> Any:
    """RMSNorm, times swish of g, then a linear map."""
    return layer_norm_swish_gate_linear(*args, **{**options, "is_rms_norm": True})


def layernorm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None = None, eps: float = 1e-6,
    group_size: int | None = None, norm_before_gate: bool = True, is_rms_norm: bool = False,
) -> Tensor:  # fmt: skip
    """Mamba-2's norm, with a swish gate before or behind it and in groups of `group_size` channels."""
    y = widen(x)
    if z is not None and not norm_before_gate:
        y = y * F.silu(widen(z))
    y = _norm(y.unflatten(-1, (-1, group_size or x.shape[-1])), eps, is_rms_norm).flatten(-2) * weight
    y = y if bias is None else y + bias
    if z is not None and norm_before_gate:
        y = y * F.silu(widen(z))
    return y.to(x.dtype)


def rmsnorm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None = None, eps: float = 1e-6,
    group_size: int | None = None, norm_before_gate: bool = True,
) -> Tensor:  # fmt: skip
    """`layernorm_fn` without the mean."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """`x / sqrt(sum(x²) + eps)`."""
    return unit(x if output_dtype is None else x.to(output_dtype), eps)


def _norm(x: Tensor, eps: float, rms: bool) -> Tensor:
    wide = widen(x)
    return F.rms_norm(wide, x.shape[-1:], eps=eps) if rms else F.layer_norm(wide, x.shape[-1:], eps=eps)


# Activations


def sigmoid(x: Tensor) -> Tensor:
    """sigmoid(x)."""
    return torch.sigmoid(x)


def logsigmoid(x: Tensor, temperature: float = 1.0) -> Tensor:
    """log sigmoid(x) / temperature."""
    return (F.logsigmoid(widen(x)) / temperature).to(x.dtype)


def swish(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return F.silu(x)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """swish(x) y."""
    return (F.silu(widen(x)) * widen(y)).to(x.dtype)


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """swiglu(x, y), then a linear map."""
    return F.linear(swiglu(x, y).to(weight.dtype), weight, bias)


# Positions


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False,
    seqlen_offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotate the first channels of x `[B, T, H, D]` by its positions' rows of `cos` and `sin`, `[positions, R]`:
    channel i with i + R, or `interleaved` with its neighbour. `seqlen_offsets` is the first position, of all sequences
    or of each; what stands before position 0 becomes zero."""
    B, T = x.shape[:2]
    offsets = torch.as_tensor(seqlen_offsets, device=x.device)
    if cu_seqlens is None:
        positions = torch.arange(T, device=x.device) + offsets.view(-1, 1)
        positions = positions.expand(B, T)
    else:
        lengths = cu_seqlens.diff()
        starts = cu_seqlens[:-1] - offsets
        positions = (torch.arange(T, device=x.device) - starts.repeat_interleave(lengths, output_size=T))[
            None
        ]
    if int(positions.max()) >= cos.shape[0]:
        raise ConfigError(
            f"the rotary tables hold {cos.shape[0]} positions and {int(positions.max()) + 1} are asked for"
        )
    R = cos.shape[1]
    before = (positions < 0)[..., None, None]
    c, s = (widen(table)[positions.clamp(min=0)].unsqueeze(2) for table in (cos, sin))
    turned, rest = widen(x[..., : 2 * R]), x[..., 2 * R :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        pairs = torch.cat([a * c - b * s, a * s + b * c], dim=-1)
    y = torch.cat([pairs.masked_fill(before, 0).to(x.dtype), rest], dim=-1)
    return x.copy_(y) if inplace else y


def token_shift(
    x: Tensor, cu_seqlens: Tensor | None = None, cache: Tensor | None = None, output_cache: bool = False,
    chunk_indices: Tensor | None = None,
) -> Any:  # fmt: skip
    """The token before minus the token, `[B, T, D]`; before the first of each sequence stands `cache` `[N, D]` or
    zero. With `output_cache` also the last token of each sequence, `[N, 1, D]`."""
    rows = [x] if cu_seqlens is None else [x[:, a:b] for a, b in pairwise(cu_seqlens.tolist())]
    firsts = (
        [None] * len(rows) if cache is None else cache.reshape(-1, 1, x.shape[2]).to(x.dtype).chunk(len(rows))
    )
    shifted = [
        torch.cat(
            [torch.zeros_like(row[:, :1]) if first is None else first[:, : row.shape[1]], row[:, :-1]], dim=1
        )
        for row, first in zip(rows, firsts, strict=True)
    ]
    delta = torch.cat(shifted, dim=1) - x
    if not output_cache:
        return delta
    if any(row.shape[1] == 0 for row in rows):
        raise UnsupportedError("an empty sequence has no last token; leave it out")
    return delta, torch.cat([row[:, -1:] for row in rows])


# Attention and RWKV-7's own


def attn_decoding_one_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    cu_seqlens: Tensor | None = None, do_gate_scale: bool = False, *, window_size: int | None = None,
    sink_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one query for each of B packed sequences, `q` `[1, B, HQ, K]`, to all of its keys: k and v
    `[1, T, H, ...]`, `g` `[1, T, HQ]` log-decays, which `do_gate_scale` multiplies with the scale as well."""
    if cu_seqlens is None:
        raise ConfigError("give cu_seqlens, the cumulative lengths of the sequences that k and v hold")
    scale = k.shape[3] ** -0.5 if scale is None else scale
    outputs = []
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        first = start if window_size is None else max(start, end - window_size)
        keys, values, query = k[:, first:end], v[:, first:end], q[:, n : n + 1]
        if g is None:
            outputs.append(softmax_attention(query, keys, values, scale=scale, sinks=sink_bias))
            continue
        group = q.shape[2] // k.shape[2]
        keys, values = (widen(x).repeat_interleave(group, dim=2) for x in (keys, values))
        decay = widen(g[:, first:end]).double() * (scale if do_gate_scale else 1)
        after = decay.flip(1).cumsum(1).flip(1) - decay
        logits = scale * torch.einsum("bqhk,bshk->bhqs", widen(query), keys)
        logits = logits + after.transpose(1, 2)[:, :, None].to(logits.dtype)
        if sink_bias is not None:
            sink = sink_bias.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = logits.softmax(-1)[..., : keys.shape[1]]
        outputs.append(torch.einsum("bhqs,bshv->bqhv", weights, values).to(v.dtype))
    return torch.cat(outputs, dim=1)


def fused_addcmul_rwkv7(
    hidden_states: Tensor, delta: Tensor, xr: Tensor, xw: Tensor, xk: Tensor, xv: Tensor, xa: Tensor,
    xg: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`hidden_states + delta * x` for each of the shares r, w, k, v, a and g."""
    x, d = widen(hidden_states), widen(delta)
    return tuple(
        None if share is None else (x + d * widen(share)).to(hidden_states.dtype)
        for share in (xr, xw, xk, xv, xa, xg)
    )


def fused_k_rwkv7(
    k: Tensor, a: Tensor, ka: Tensor, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None
) -> Tensor:
    """`k (1 + (a - 1) ka)`."""
    return (widen(k) * (1 + (widen(a) - 1) * widen(ka))).to(k.dtype)


def gate_output_correction(o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """`(o + (sum of r k r_k over a head) v) g`."""
    bonus = (widen(r) * widen(k) * widen(r_k)).sum(-1, keepdim=True) * widen(v)
    return ((widen(o) + bonus.reshape(o.shape)) * widen(g)).to(o.dtype)
