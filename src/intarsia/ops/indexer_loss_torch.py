"""The indexer's loss in PyTorch, a block of queries at a time; a backward pass computes each block again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.ops.blockwise import recomputed
from intarsia.ops.choice import Implementation
from intarsia.ops.indexer_loss_call import IndexerLossCall
from intarsia.ops.precision import compute_dtype, without_autocast
from intarsia.ops.uncompiled import Uncompiled

ROOM = 1 << 22
"""So many numbers of keys, products and weights are there at a time, or those of one query."""


def indexer_loss_torch(call: IndexerLossCall) -> Tensor:
    """`[B, T]`, float32 (float64 for float64)."""
    index = call.index
    lengths = (index.q.shape[1],) if index.seqs is None else index.seqs.lengths
    tensors = (index.q, call.keys, index.weights, call.q.detach(), call.k.detach(), call.picked)
    return _LOSS(tensors, lengths, (index.relu, index.scale, call.scale))[0]


def _of_sequences(
    tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]
) -> list[Tensor]:
    occupied = [n for n in lengths if n]
    nothing = [None] * len(occupied)
    parts = (nothing if x is None else x.split(occupied, dim=1) for x in tensors)
    return [torch.cat([_of_one(*part, *numbers) for part in zip(*parts, strict=True)], dim=1)]


def _of_one(
    index_q: Tensor,
    index_k: Tensor,
    weights: Tensor,
    q: Tensor,
    k: Tensor,
    picked: Tensor | None,
    relu: float,
    index_scale: float,
    scale: float,
) -> Tensor:
    """`[B, T]` of sequences of one length."""
    B, T, H = q.shape[:3]
    wide = compute_dtype(index_q, index_k, weights)
    index_q, index_k, weights = (x.to(wide) for x in (index_q, index_k, weights))
    q, k = q.detach().to(wide), k.detach().to(wide)
    batch = torch.arange(B, device=q.device)[:, None, None]

    def some(
        index_q: Tensor, weights: Tensor, q: Tensor, place: Tensor, index_k: Tensor, picked: Tensor | None
    ) -> Tensor:
        if picked is None:
            there = torch.arange(T, device=q.device) <= place[:, None]
            keys, of_heads = index_k[:, None], k.transpose(1, 2)[:, None]
        else:
            token = picked[:, :, 0].long()
            there = (token >= 0) & (token <= place[:, None])
            token = token.where(there, token[..., :1].clamp(min=0).minimum(place[:, None]))
            keys, of_heads = index_k[batch, token], k[batch, token].transpose(2, 3)
        products = (index_q @ keys.mT) * index_scale
        scores = (weights[:, :, None] @ (products.relu() if relu else products))[:, :, 0]
        with torch.no_grad():
            logits = q.unflatten(2, (k.shape[2], -1)) @ of_heads.mT * scale
            hidden = ~there if picked is None else ~there[:, :, None, None]
            hidden = hidden[:, None, None] if picked is None else hidden
            given = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).sum(dim=(2, 3)) / H
        told = scores.masked_fill(~there, -torch.inf).log_softmax(dim=-1).masked_fill(~there, 0)
        return (torch.special.xlogy(given, given) - given * told).sum(-1)

    size = T if picked is None else picked.shape[-1]
    gathered = 0 if picked is None else index_k.shape[2] + k.shape[2] * k.shape[3]
    rows = max(ROOM // (B * size * (H + weights.shape[2] + gathered)), 1)
    place = torch.arange(T, device=q.device)
    found = []
    with without_autocast(q):
        for begin in range(0, T, rows):
            part = slice(begin, begin + rows)
            block = (index_q[:, part], weights[:, part], q[:, part], place[part], index_k)
            found.append(recomputed(some, *block, None if picked is None else picked[:, part]))
    return torch.cat(found, dim=1)


def _room(tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]) -> list[Tensor]:
    q, k, weights = tensors[:3]
    assert q is not None
    assert k is not None
    assert weights is not None
    return [q.new_empty(q.shape[:2], dtype=compute_dtype(q, k, weights))]


_LOSS = Uncompiled("indexer_loss", 6, 1, _of_sequences, _room)

IMPLEMENTATION = Implementation("torch", indexer_loss_torch)
