"""Causal softmax attention over whole, cached and packed sequences, on PyTorch's fused kernels.

Two variations keep to those kernels. A sliding window is worked off in blocks of queries, each with the keys that
its queries can see, so that time and memory grow with the tokens times the window. A sink is one key more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops import Sequences
from intarsia.ops.blockwise import Blockwise
from intarsia.ops.finite import attended

FEW = 8
"""Up to so many queries that follow others are computed without fused kernels where there are sinks."""


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    seqs: Sequences | None = None,
) -> Tensor:
    """`softmax(q kᵀ scale) v` where each query sees the keys up to its own token.

    Args:
        q: `[B, T, H, K]`: the last T of the S tokens that k and v hold.
        k, v: `[B, S, HKV, K]`, `[B, S, HKV, V]`; H a multiple of HKV.
        window: a query sees so many keys and no more, its own among them: `i - window < j <= i`.
        sinks: `[H]`, a logit of each head that takes part in the softmax and has no value (gpt-oss): what it is
            given of the probability is lost.
        seqs: sequences packed into one row (then `B == 1` and `S == T`).

    Returns:
        `[B, T, H, V]` in the dtype of q.
    """
    if seqs is not None and len(seqs.occupied) > 1:
        parts = zip(*(x.split(seqs.occupied, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat(
            [causal_attention(*part, scale=scale, window=window, sinks=sinks) for part in parts], dim=1
        )
    T, S = q.shape[1], k.shape[1]

    def attend(k: Tensor, v: Tensor) -> Tensor:
        if window is not None and window < S:
            return _WINDOWED(None, (q, k, v, sinks), scale, window)
        mask = visible(T, S, None, q.device) if 1 < T < S else None
        return _attend(q, k, v, mask, scale=scale, sinks=sinks)

    return attended(attend, [k], [v], queries=q, windows=[window, window])


def visible(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """Which of S keys each of the last T tokens sees, `[T, S]` bool."""
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return seen if window is None else seen.triu(S - T - window + 1)


def _windowed(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: float) -> Tensor:
    """Attention with a window that hides some of the keys, a block of queries after the other."""
    T, window = q.shape[1], int(window)
    # Of its keys a block needs `window` a query: as many rows as that waste half of the scores at most, and more
    # than some hundred would only make the mask larger.
    rows = min(max(window, 64), 512)
    before = -(-(window - 1) // rows)
    queries = q.split(rows, dim=1)
    past = min(k.shape[1] - T, window - 1)
    # Blocks are put together from pieces: the gradient of a piece is as large as the piece, and that of a slice as
    # large as all keys.
    lengths = [past, *(block.shape[1] for block in queries)]
    keys, values = (x[:, x.shape[1] - T - past :].split(lengths, dim=1) for x in (k, v))
    masks: dict[tuple[int, int], Tensor] = {}
    outputs = []
    for n, block in enumerate(queries):
        near = slice(max(n + 1 - before, 0), n + 2)
        r = block.shape[1]
        k_n, v_n = (torch.cat(x[near], dim=1)[:, -(r + window - 1) :] for x in (keys, values))
        size = r, k_n.shape[1]
        if r > 1 and size not in masks:
            masks[size] = visible(*size, window, q.device)
        outputs.append(_attend(block, k_n, v_n, masks.get(size), scale=scale, sinks=sinks))
    return torch.cat(outputs, dim=1)


_WINDOWED = Blockwise(
    "windowed_attention", 4, _windowed, lambda x: x[0].new_empty(*x[0].shape[:3], x[2].shape[3])
)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, sinks: Tensor | None
) -> Tensor:
    """Attention of T queries to the keys that `mask` `[T, S]` shows; without a mask one query to all keys, or as many
    queries as keys to those up to their own."""
    T, K, V = q.shape[1], q.shape[3], v.shape[3]
    # Said by a branch, which torch.compile decides: the fused kernels take no symbol for a truth value.
    causal = True if mask is None and T > 1 else False  # noqa: SIM210
    if sinks is not None:
        if T <= FEW and not causal:
            # The sink as a key costs a copy of all others, and a few queries cost little more than that.
            return _weigh(q, k, v, mask, scale=scale, sinks=sinks)
        q, k, v = _with_sink_key(q, k, v, scale=scale, sinks=sinks, causal=causal)
        K = q.shape[3]
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    # Fused kernels want keys and values of one size; zeros change neither scores nor what is kept of outputs.
    q, k, v = (F.pad(x, (0, max(K, V) - x.shape[3])) if K != V else x for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)[:, -T:, :, :V]


def _with_sink_key(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, sinks: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a key in front whose logit is the sink and whose value is zero.

    Channels of their own make its logit: the sink in each query, `1 / scale` in this key, zero in all others. The
    fused causal mask lets the first query see the first key alone, so a query is put in front as well there, the
    result of which is to be dropped.
    """
    B, T, H, K = q.shape
    HKV = k.shape[2]
    # Eight channels, since fused kernels want multiples of that; two of them hold 1 / scale to twice the digits.
    inverse = torch.tensor(1 / scale, dtype=torch.float64)
    high = inverse.to(k.dtype)
    low = (inverse - high).to(k.dtype)
    sink_key = F.pad(torch.stack([high, low]).to(k.device), (K, 6)).expand(B, 1, HKV, K + 8)
    q = torch.cat([q, sinks.to(q.dtype)[:, None].expand(B, T, H, 8)], dim=-1)
    if causal:
        q = F.pad(q, (0, 0, 0, 0, 1, 0))
    return q, torch.cat([sink_key, F.pad(k, (0, 8))], dim=1), F.pad(v, (0, 0, 0, 0, 1, 0))


def _weigh(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, sinks: Tensor) -> Tensor:
    """The same, written out, for a few queries: the keys and values are read where they are."""
    T, H, HKV = q.shape[1], q.shape[2], k.shape[2]
    group = H // HKV
    # The queries of all heads that share a key head are the rows of one product, which reads the keys once.
    rows = q.unflatten(2, (HKV, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    logits = (rows @ k.permute(0, 2, 3, 1)).unflatten(2, (group, T))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    sink = sinks.to(logits.dtype).view(HKV, group, 1, 1).expand(*logits.shape[:-1], 1)
    weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1].to(q.dtype)
    o = weights.flatten(2, 3) @ v.transpose(1, 2)
    return o.unflatten(2, (group, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


@torch.no_grad()
def largest_logit(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    window: int | None = None,
    seqs: Sequences | None = None,
    rows: int = 256,
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
            first = 0 if window is None else max(start - window + 1, 0)
            keys = k_n[:, first : start + block.shape[2]].transpose(1, 2).repeat_interleave(H // HKV, dim=1)
            logits = (block @ keys.mT).float() * scale
            hidden = ~visible(logits.shape[-2], logits.shape[-1], window, q.device)
            largest = torch.maximum(largest, logits.masked_fill(hidden, -torch.inf).amax(dim=(0, 2, 3)))
    return largest
