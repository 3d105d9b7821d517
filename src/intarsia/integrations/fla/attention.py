"""Softmax attention: plain, forgetting, PaTH and DeltaFormer."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.integrations.fla.common import sequences
from intarsia.mixers.deltaformer import erased_values
from intarsia.mixers.path import path_attention
from intarsia.ops import Sequences, cumulative_log_gate, softmax_attention
from intarsia.ops.blockwise import per_sequence
from intarsia.ops.precision import widen


def parallel_attn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    window_size: int | None = None, cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None, *,
    sink_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal softmax attention (`fla.ops.attn`).

    `q` is `[B, T, HQ, K]`, k and v `[B, T, H, ...]` with HQ a multiple of H. `g` `[B, T, HQ]` are log-decays whose
    sums from key to query are added to the logits (forgetting attention). A query sees `window_size` keys, its own
    among them. `sink_bias` `[HQ]` are logits that take part in the softmax and have no value. Returns
    `[B, T, HQ, V]`.
    """
    _check_heads(q, k, v)
    scale = k.shape[3] ** -0.5 if scale is None else scale
    seqs = _packed(q, cu_seqlens)
    if window_size is not None and window_size < 1:
        raise ConfigError(f"window_size must be positive; got {window_size}")
    if sink_bias is not None and sink_bias.shape != q.shape[2:3]:
        raise ShapeError(f"sink_bias must be [HQ] = {[q.shape[2]]}; got {list(sink_bias.shape)}")
    if g is not None and g.shape != q.shape[:3]:
        raise ShapeError(f"g must be [B, T, HQ] = {list(q.shape[:3])}; got {list(g.shape)}")
    c = None if g is None else cumulative_log_gate(g, seqs=seqs)
    return softmax_attention(
        q, k, v, scale=scale, window=window_size, sinks=sink_bias, log_gate=c, cu_seqlens=seqs
    )


def parallel_forgetting_attn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None, window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Forgetting attention (`fla.ops.forgetting_attn`); arguments as in `parallel_attn`."""
    return parallel_attn(q, k, v, g, scale, window_size, cu_seqlens)


def parallel_path_attn(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, g: Tensor | None = None,
    scale: float | None = None, cu_seqlens: Tensor | None = None, use_cache: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """PaTH attention (`fla.ops.path_attn`): the logits are `scale (k_jᵀ H_{j+1} .. H_i q_i + g_{j+1} + .. + g_i)` with
    `H_t = I - beta_t w_t w_tᵀ`.

    `q` is `[B, T, HQ, K]`, k, v and w `[B, T, H, ...]` with HQ a multiple of H, `beta` `[B, T, H]`, `g` `[B, T, HQ]`.
    Returns `[B, T, HQ, V]` and, with `use_cache`, the keys `[B, T, H, K]` multiplied by the maps of all tokens behind
    them in their sequence, in the dtype of k.
    """
    _check_heads(q, k, v)
    if w.shape != k.shape or beta.shape != k.shape[:3]:
        raise ShapeError(
            f"w must be {list(k.shape)} as k and beta {list(k.shape[:3])}; got {list(w.shape)} and {list(beta.shape)}"
        )
    if g is not None and g.shape != q.shape[:3]:
        raise ShapeError(f"g must be [B, T, HQ] = {list(q.shape[:3])}; got {list(g.shape)}")
    scale = k.shape[3] ** -0.5 if scale is None else scale
    seqs = _packed(q, cu_seqlens)
    c = None if g is None else cumulative_log_gate(scale * widen(g), seqs=seqs)
    group = q.shape[2] // k.shape[2]
    rows = [q, *(x.repeat_interleave(group, dim=2) for x in (k, v, w, beta)), c]
    lengths = [q.shape[1]] if seqs is None else list(seqs.lengths)
    parts = [[None] * len(lengths) if x is None else x.split(lengths, dim=1) for x in rows]
    outputs, caches = zip(
        *(path_attention(*part, scale=scale, keep=use_cache) for part in zip(*parts, strict=True)),
        strict=True,
    )
    cache = torch.cat(caches, dim=1)[:, :, ::group].to(k.dtype) if use_cache else None
    return torch.cat(outputs, dim=1), cache


def deltaformer_attn(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None, attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, C: int | None = None,
) -> Tensor:  # fmt: skip
    """DeltaFormer (`fla.ops.deltaformer`): `u_t = v_t - beta_t sum_{j<t} softmax_j(k_t k_j / sqrt(K)) u_j`, then
    softmax attention over u.

    All tensors are `[B, T, H, ...]`, `beta` `[B, T, H]` (1 by default). `attention_mask` `[B, T]` has zeros where there
    is padding: as in flash-linear-attention it hides those tokens from the attention over u and not from u itself,
    so that padding on the right alone changes nothing; their outputs are zero. `C` changes nothing.
    """
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ShapeError(
            f"q, k and v must share [B, T, H]; got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    scale = k.shape[3] ** -0.5
    seqs = _packed(q, cu_seqlens)
    u = per_sequence(lambda *parts: erased_values(*parts, scale=scale), seqs, k, k, v, beta).to(q.dtype)
    if attention_mask is None:
        return softmax_attention(q, k, u, scale=scale, cu_seqlens=seqs)
    if attention_mask.shape != q.shape[:2]:
        raise ShapeError(
            f"attention_mask must be [B, T] = {list(q.shape[:2])}; got {list(attention_mask.shape)}"
        )
    seen = attention_mask.bool()
    lengths = tuple(length for length in seen.sum(1).tolist() if length)
    o = torch.zeros(v.shape, dtype=q.dtype, device=q.device)
    if lengths:
        rows = (x[seen][None] for x in (q, k, u))
        o[seen] = softmax_attention(*rows, scale=scale, cu_seqlens=Sequences(lengths))[0]
    return o


def _packed(q: Tensor, cu_seqlens: Tensor | None) -> Sequences | None:
    seqs = sequences(cu_seqlens)
    if seqs is not None and (q.shape[0] != 1 or seqs.total != q.shape[1]):
        raise ShapeError(
            f"cu_seqlens describes one row of {seqs.total} tokens (B == 1); q is {list(q.shape)}"
        )
    return seqs


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[:2] != q.shape[:2]:
            raise ShapeError(f"q, k and v must be [B, T, heads, dim]; got {name} {list(x.shape)}")
    HQ, H = q.shape[2], k.shape[2]
    if k.shape[3] != q.shape[3] or v.shape[2] != H:
        raise ShapeError(
            f"k must have the channels of q and v the heads of k; got {[list(x.shape) for x in (q, k, v)]}"
        )
    if H == 0 or HQ % H:
        raise ShapeError(f"the query heads must be a multiple of the key heads: {HQ} is not one of {H}")
