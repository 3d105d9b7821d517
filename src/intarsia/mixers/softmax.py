"""Causal softmax attention over whole, cached and packed sequences, on PyTorch's fused kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops import Sequences


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, seqs: Sequences | None = None
) -> Tensor:
    """`softmax(q kᵀ scale) v` where each query sees the keys up to its own token.

    Args:
        q: `[B, T, H, K]`: the last T of the S tokens that k and v hold.
        k, v: `[B, S, HKV, K]`, `[B, S, HKV, V]`; H a multiple of HKV.
        seqs: sequences packed into one row (then `B == 1` and `S == T`).

    Returns:
        `[B, T, H, V]` in the dtype of q.
    """
    if seqs is not None and seqs.count > 1:
        parts = (x.split(seqs.lengths, dim=1) for x in (q, k, v))
        return torch.cat([causal_attention(*part, scale=scale) for part in zip(*parts, strict=True)], dim=1)
    T, S, K, V = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    # Fused kernels want keys and values of one size; zeros change neither scores nor what is kept of outputs.
    q, k, v = (F.pad(x, (0, max(K, V) - x.shape[3])) if K != V else x for x in (q, k, v))
    mask = None
    if 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=T == S and T > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)[..., :V]


@torch.no_grad()
def largest_logit(
    q: Tensor, k: Tensor, *, scale: float, seqs: Sequences | None = None, rows: int = 256
) -> Tensor:
    """The largest `q kᵀ scale` of each head over the pairs that causal attention looks at, `[H]` float32.

    Works on `rows` queries at a time, so that no `[T, T]` matrix is held.
    """
    H, HKV = q.shape[2], k.shape[2]
    largest = torch.full((H,), -torch.inf, device=q.device)
    lengths = (q.shape[1],) if seqs is None else seqs.lengths
    for q_n, k_n in zip(q.split(lengths, dim=1), k.split(lengths, dim=1), strict=True):
        for start in range(0, q_n.shape[1], rows):
            block = q_n[:, start : start + rows].transpose(1, 2)
            keys = k_n[:, : start + block.shape[2]].transpose(1, 2).repeat_interleave(H // HKV, dim=1)
            logits = (block @ keys.mT).float() * scale
            future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(start + 1)
            logits = logits.masked_fill(future, -torch.inf)
            largest = torch.maximum(largest, logits.amax(dim=(0, 2, 3)))
    return largest
