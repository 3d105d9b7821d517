"""The specification of the selector of blocks: one query at a time, in float64, written to be read.

Key e is of the `width` tokens up to token `(e + 1) stride - 1`, and a query of token i sees it from that token on. With

    s_he = q_h · k_e scale, or of "softmax" softmax_e(q_h · k_e scale) over the keys that the query sees
    s_ge = sum of s_he over the heads of group g

a block's score is the largest s_ge of the keys that the query sees and that have a token of it; or of "sum" each of
them times the strides that it has in common with the block, summed. The first and the last blocks are above all.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from intarsia.ops.attention_call import queries_of
from intarsia.ops.blocks_call import BlocksCall
from intarsia.ops.choice import Implementation
from intarsia.ops.keys import row_of


def blocks_reference(call: BlocksCall) -> Tensor:
    """`[B, T, G, slots]` int32."""
    outputs = []
    for n, q in queries_of(call.q, call.seqs):
        if isinstance(call.k, Tensor) and call.seqs is not None:
            k = call.k[0, call.seqs.starts[n] :][: call.seqs.lengths[n]].double()
        else:
            k = row_of(call.k, n)[0].double()
        T = q.shape[1]
        rows = [_of_query(q[0, t].double(), k, call.tokens[n] - T + t, call) for t in range(T)]
        outputs.append(torch.tensor(rows, dtype=torch.int32, device=q.device))
    return torch.stack(outputs) if call.seqs is None else torch.cat(outputs)[None]


def _of_query(q: Tensor, k: Tensor, i: int, call: BlocksCall) -> list[list[int]]:
    """What a query `[H, K]` of token i picks for each group."""
    seen = range(call.width // call.stride - 1, (i + 1) // call.stride)
    keys = k[list(seen)].repeat_interleave(q.shape[0] // k.shape[1], dim=1)
    scores = torch.einsum("hk,ehk->he", q, keys) * call.scale
    if call.score == "softmax":
        scores = scores.softmax(dim=1)
    of_groups = scores.unflatten(0, (call.groups, -1)).sum(1).tolist()
    return [_best(dict(zip(seen, row, strict=True)), i, call) for row in of_groups]


def _best(scores: dict[int, float], i: int, call: BlocksCall) -> list[int]:
    """The blocks that token i picks, rising, with -1 behind them, by the scores of the keys that it sees."""
    own, value = i // call.block, {}
    for b in range(own + 1):
        if b < call.first or b > own - call.last:
            value[b] = float("inf")
            continue
        common = {e: _common(e, b, call) for e in scores}
        inside = [(scores[e], strides) for e, strides in common.items() if strides]
        if inside:
            whole = (
                max(_ordered(s) for s, _ in inside)
                if call.pooling == "max"
                else sum(s * strides for s, strides in inside)
            )
            value[b] = _ordered(whole)
    found = sorted(sorted(value, key=lambda b: (-value[b], b))[: call.count])
    return found + [-1] * (call.slots - len(found))


def _common(e: int, b: int, call: BlocksCall) -> int:
    """How many strides key e and block b have in common."""
    size, wide = call.block // call.stride, call.width // call.stride
    return max(min(e, (b + 1) * size - 1) - max(e - wide + 1, b * size) + 1, 0)


def _ordered(score: float) -> float:
    """A number that compares: what is none, or above all numbers, is the largest."""
    return sys.float_info.max if score != score else min(max(score, -sys.float_info.max), sys.float_info.max)


IMPLEMENTATION = Implementation("reference", blocks_reference, automatic=False)
