"""Softmax attention with a forget gate, in blocks of queries: what no fused kernel of PyTorch serves."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.blockwise import Blockwise, recomputed
from intarsia.ops.finite import attended
from intarsia.ops.precision import widen, without_autocast
from intarsia.ops.sequences import Sequences

BLOCK = 128
"""The queries that are computed together."""

LEAST_LOG_GATE = -(2.0**14)
"""Log forget gates are no smaller, not even -inf: exp of it is zero in every dtype, and sums stay exact."""


def cumulative_log_gate(
    log_gate: Tensor, before: Tensor | None = None, seqs: Sequences | None = None
) -> Tensor:
    """The sums of log gates `[B, T, H]` over each sequence up to each token, `[B, T, H]` in float64.

    A bias is the difference of two such sums. They grow with the sequence and the bias between neighbours does not:
    in float32 it would lose a bit with every doubling, and other bits where a sequence is split. In float64 more is
    left than float32 holds, for any length that fits a memory. A gate is `LEAST_LOG_GATE` at least.

    `before` `[N, H]` are the sums over the tokens before, of each sequence (zero without).
    """
    log_gate = widen(log_gate).clamp(min=LEAST_LOG_GATE).double()
    if seqs is None:
        total = log_gate.cumsum(1)
        return total if before is None else total + before[:, None]
    total = torch.cat([part.cumsum(1) for part in log_gate.split(seqs.lengths, dim=1)], dim=1)
    return total if before is None else total + before[seqs.indices(before.device)]


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    seqs: Sequences | None = None,
) -> Tensor:
    """`o_i = sum_{j <= i} softmax_j(q_i k_j scale + c_i - c_j) v_j` of queries that are the last T of S tokens, or of
    a packed row whose sequences have as many keys as queries; `[B, T, H, V]` in the dtype of q, computed in float32
    (float64 for float64)."""
    # Blocks of packed sequences are cut from each tensor along the tokens.
    rows = None if sinks is None else sinks.expand(*q.shape[:2], -1)
    return _GATED(seqs, (q, k, v, c, rows), scale, window or 0)


def _gated(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, sinks: Tensor | None, scale: float, window: float
) -> Tensor:
    """A window of 0 means None."""
    reach, sink = int(window) or None, None if sinks is None else sinks[0, 0]
    return attended(
        lambda c, k, v: _in_blocks(q, k, v, c, scale, reach, sink),
        [c, k],
        [v],
        queries=q,
        windows=[reach] * 3,
    )


_GATED = Blockwise("gated_attention", 5, _gated, lambda x: x[0].new_empty(*x[0].shape[:3], x[2].shape[3]))


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    H, HKV = q.shape[2], k.shape[2]

    def of_block(q: Tensor, k: Tensor, v: Tensor, cq: Tensor, ck: Tensor) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        seen = seen if window is None else seen.triu(m - n - window + 1)
        # The queries of all heads that share a key head are the rows of one product.
        logits = scale * (_grouped(q, HKV) @ k.mT).view(-1, H, n, m)
        logits = logits + (cq[..., None] - ck[..., None, :]).to(q.dtype)
        logits = logits.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
            weights = torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        return (_grouped(weights, HKV) @ v).view(-1, H, n, v.shape[3])

    T, seen = q.shape[1], k.shape[1] - q.shape[1]
    queries, keys, values = (widen(x).transpose(1, 2) for x in (q, k, v))
    gates = c.transpose(1, 2)
    outputs = []
    with without_autocast(q):
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            near = slice(0 if window is None else max(seen + start - window + 1, 0), seen + end)
            outputs.append(
                recomputed(
                    of_block,
                    queries[:, :, start:end],
                    keys[:, :, near],
                    values[:, :, near],
                    gates[:, :, seen + start : seen + end],
                    gates[:, :, near],
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).to(q.dtype)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """`[B, H, n, ...]` with the rows of all heads that share one of `heads` key heads laid end to end."""
    return x if x.shape[1] == heads else x.reshape(x.shape[0], heads, -1, x.shape[3])
