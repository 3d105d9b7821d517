"""The specification of the loss of an indexer that picks blocks: one query at a time, in float64, written to be read.

Of a query of token t and the group g of heads, over the blocks b of the tokens that it may read (all up to t, or those
of the blocks that it picked):

    I_b = max_{s in b} q'_g · k'_s scale'        p_b ∝ max_{s in b} mean_{h in g} softmax_s(q_h · k_s scale)
    loss = mean_g KL(p || softmax(I))            p a constant
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.attention_call import queries_of
from intarsia.ops.blocks_loss_call import BlocksLossCall
from intarsia.ops.choice import Implementation
from intarsia.ops.precision import compute_dtype


def blocks_loss_reference(call: BlocksLossCall) -> Tensor:
    """`[B, T]`."""
    outputs = []
    each = [dict(queries_of(x, call.seqs)) for x in (call.index_q, call.index_k[:, :, None], call.q, call.k)]
    picked = {} if call.picked is None else dict(queries_of(call.picked, call.seqs))
    for n in each[0]:
        index_q, index_k, q, k = (x[n][0].double() for x in each)
        rows = []
        for t in range(len(q)):
            losses = []
            for g, index_query in enumerate(index_q[t]):
                chosen = set(picked[n][0, t, g].tolist()) if n in picked else set(range(t + 1))
                tokens = [s for s in range(t + 1) if s // call.block in chosen]
                losses.append(_of_group(index_query, index_k[:, 0], q[t], k, g, tokens, call))
            rows.append(torch.stack(losses).mean())
        outputs.append(torch.stack(rows))
    found = torch.stack(outputs) if call.seqs is None else torch.cat(outputs)[None]
    return found.to(compute_dtype(call.index_q, call.index_k))


def _of_group(
    index_q: Tensor, index_k: Tensor, q: Tensor, k: Tensor, g: int, tokens: list[int], call: BlocksLossCall
) -> Tensor:
    """`[]`, of one query `[D]` of group g, and attention's `[H, K]`."""
    if not tokens:
        return 0 * index_q.sum()
    size = q.shape[0] // call.index_q.shape[2]
    own = slice(g * size, (g + 1) * size)
    heads = k[tokens].repeat_interleave(q.shape[0] // k.shape[1], dim=1)[:, own]
    weights = torch.einsum("hk,shk->hs", q[own], heads).mul(call.scale).softmax(1).mean(0).detach()
    scores = index_k[tokens] @ index_q * call.index_scale
    blocks = torch.tensor([s // call.block for s in tokens], device=q.device)
    numbers = sorted(set(blocks.tolist()))
    p = torch.stack([weights[blocks == b].amax() for b in numbers])
    p = p / p.sum()
    told = torch.stack([scores[blocks == b].amax() for b in numbers]).log_softmax(0)
    return (torch.special.xlogy(p, p) - p * told).sum()


IMPLEMENTATION = Implementation("reference", blocks_loss_reference, automatic=False)
