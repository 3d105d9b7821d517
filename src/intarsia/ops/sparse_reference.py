"""The specification of sparse attention and of its indexer: one query at a time, in float64, written to be read.

The indexer, of a query of token i and the index keys k_b, each of a block of `block` tokens:

    I_b = sum_h w_h relu(q_h · k_b scale)        picked = the `count` blocks with the largest I_b, of those complete

and the block that token i stands in, where that is not complete. Attention then is that of `attention_reference` over
the tokens `j <= i` of the blocks that were picked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.attention_call import queries_of
from intarsia.ops.choice import Implementation
from intarsia.ops.indexer_loss_call import IndexerLossCall
from intarsia.ops.keys import Keys, row_of
from intarsia.ops.precision import compute_dtype
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import IndexerCall, SparseCall, SparseLatentCall


def indexer_reference(call: IndexerCall) -> Tensor:
    """`[B, T, 1, slots]` int32."""
    weights = dict(queries_of(call.weights[..., None], call.seqs))
    outputs = []
    for n, q in queries_of(call.q, call.seqs):
        k, w = _of_sequence(call.k, call.seqs, n).double(), weights[n][0, ..., 0].double()
        T = q.shape[1]
        rows = [
            _best(index_scores(q[0, t].double(), k, w[t], call), call.tokens[n] - T + t, call)
            for t in range(T)
        ]
        outputs.append(torch.tensor(rows, dtype=torch.int32, device=q.device))
    found = torch.stack(outputs) if call.seqs is None else torch.cat(outputs)[None]
    return found[:, :, None]


def index_scores(q: Tensor, k: Tensor, weights: Tensor, call: IndexerCall) -> Tensor:
    """`I_b` `[S]` of one query `[H, K]` and index keys `[S, K]`."""
    products = k @ q.T * call.scale
    return (products.relu() if call.relu else products) @ weights


def _best(scores: Tensor, i: int, call: IndexerCall) -> list[int]:
    """The blocks that token i picks, rising, with -1 behind them."""
    complete = (i + 1) // call.block
    value = scores.nan_to_num(torch.inf, torch.inf, -torch.inf).tolist()
    found = sorted(sorted(range(complete), key=lambda b: (-value[b], b))[: call.count])
    if (i + 1) % call.block:
        found.append(complete)
    return found + [-1] * (call.slots - len(found))


def sparse_reference(call: SparseCall) -> Tensor:
    """`[B, T, H, V]` in the dtype of q."""
    outputs = []
    dense = call.dense
    picked = dict(queries_of(call.picked, dense.seqs))
    for n, q in queries_of(dense.q, dense.seqs):
        k, v = (_of_sequence(x, dense.seqs, n).double() for x in (dense.k, dense.v))
        outputs.append(_of_queries(q[0].double(), k, v, picked[n][0], call.block, dense.scale))
    return _laid(outputs, dense.q, dense.seqs)


def sparse_latent_reference(call: SparseLatentCall) -> Tensor:
    """The same with the keys and values that the latents stand for: `[B, T, H, V]` in the dtype of q."""
    outputs = []
    dense = call.dense
    picked = dict(queries_of(call.picked, dense.seqs))
    for n, q in queries_of(dense.q, dense.seqs):
        latent, shared = (
            _of_sequence(dense.latents, dense.seqs, n)
            .double()
            .split_with_sizes([dense.rank, dense.q.shape[3] - dense.own], dim=-1)
        )
        own, v = torch.einsum("sr,hcr->shc", latent, dense.up.double()).split_with_sizes(
            [dense.own, dense.up.shape[1] - dense.own], dim=-1
        )
        k = torch.cat([own, shared[:, None].expand(-1, dense.q.shape[2], -1)], dim=-1)
        outputs.append(_of_queries(q[0].double(), k, v, picked[n][0], call.block, dense.scale))
    return _laid(outputs, dense.q, dense.seqs)


def indexer_loss_reference(call: IndexerLossCall) -> Tensor:
    """`[B, T]`: of each query `KL(p || softmax(I))` over the tokens that it picked, p what attention gives them: the
    sum over heads, divided by their number, and a constant. Of blocks the largest share of a token of each that is
    complete, divided by their sum."""
    index, outputs, block = call.index, [], call.block
    each = [dict(queries_of(x, call.seqs)) for x in (index.q, index.weights[..., None], call.q, call.k)]
    picked = {} if call.picked is None else dict(queries_of(call.picked, call.seqs))
    for n in each[0]:
        index_q, weights, q, k = (x[n][0].double() for x in each)
        index_k = _of_sequence(index.k, call.seqs, n).double()
        rows = []
        for t in range(len(q)):
            tokens = list(range(t + 1))
            if n in picked:
                blocks = set(picked[n][0, t, 0].tolist())
                tokens = [j for j in tokens if j // block in blocks]
            heads = k[tokens].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            p = torch.einsum("hk,shk->hs", q[t], heads).mul(call.scale).softmax(1).mean(0).detach()
            complete = [b for b in dict.fromkeys(j // block for j in tokens) if (b + 1) * block <= t + 1]
            if not complete:
                rows.append(0 * index_q[t].sum())
                continue
            if block > 1:
                share = dict(zip(tokens, p, strict=True))
                p = torch.stack([max(share[j] for j in range(b * block, (b + 1) * block)) for b in complete])
                p = p / p.sum()
            told = index_scores(index_q[t], index_k[complete], weights[t, :, 0], index).log_softmax(0)
            rows.append((torch.special.xlogy(p, p) - p * told).sum())
        outputs.append(torch.stack(rows))
    found = torch.stack(outputs) if call.seqs is None else torch.cat(outputs)[None]
    return found.to(compute_dtype(index.q, call.keys, index.weights))


def _of_queries(q: Tensor, k: Tensor, v: Tensor, picked: Tensor, block: int, scale: float) -> Tensor:
    """`[T, H, V]` of queries `[T, H, K]`, the last of the tokens that k `[S, HKV, K]` and v are of."""
    T, S, H = q.shape[0], k.shape[0], q.shape[1]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    rows = []
    for t in range(T):
        i, heads = S - T + t, []
        for h in range(H):
            blocks = set(picked[t, h // (H // picked.shape[1])].tolist())
            tokens = [j for j in range(i + 1) if j // block in blocks]
            if not tokens:
                heads.append(q.new_zeros(v.shape[-1]))
                continue
            weights = (k[tokens, h] @ q[t, h] * scale).softmax(dim=0)
            heads.append(weights @ v[tokens, h])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def _of_sequence(keys: Keys, seqs: Sequences | None, n: int) -> Tensor:
    """The entries `[S, ...]` of sequence n."""
    if isinstance(keys, Tensor) and seqs is not None:
        return keys[0, seqs.starts[n] :][: seqs.lengths[n]]
    return row_of(keys, n)[0]


def _laid(outputs: list[Tensor], q: Tensor, seqs: Sequences | None) -> Tensor:
    """The sequences' outputs, laid as q is."""
    o = torch.stack(outputs) if seqs is None else torch.cat(outputs)[None]
    return o.to(q.dtype)


INDEXER = Implementation("reference", indexer_reference, automatic=False)
IMPLEMENTATION = Implementation("reference", sparse_reference, automatic=False)
LOSS = Implementation("reference", indexer_loss_reference, automatic=False)
OF_LATENTS = Implementation("reference", sparse_latent_reference, automatic=False)
