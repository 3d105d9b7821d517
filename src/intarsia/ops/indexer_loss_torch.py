"""The indexer's loss in PyTorch, a block of queries at a time; a backward pass computes each block again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.ops.blockwise import products_of_all, recomputed
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
    return _LOSS(tensors, lengths, (index.relu, index.scale, call.scale, call.block))[0]


def _of_sequences(
    tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]
) -> list[Tensor]:
    occupied = [n for n in lengths if n]
    nothing, block = [None] * len(occupied), int(numbers[3])
    sizes = [occupied, [n // block for n in occupied], *[occupied] * 4]
    parts = (nothing if x is None else x.split(n, dim=1) for x, n in zip(tensors, sizes, strict=True))
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
    block: float,
) -> Tensor:
    """`[B, T]` of sequences of one length."""
    block = int(block)
    B, T, H = q.shape[:3]
    wide = compute_dtype(index_q, index_k, weights)
    index_q, index_k, weights = (x.to(wide) for x in (index_q, index_k, weights))
    q, k = q.detach().to(wide), k.detach().to(wide)
    batch = torch.arange(B, device=q.device)[:, None, None]

    def some(
        index_q: Tensor,
        weights: Tensor,
        q: Tensor,
        place: Tensor,
        index_k: Tensor,
        k: Tensor,
        picked: Tensor | None,
    ) -> Tensor:
        # Of blocks (a token is one) those that are complete, and of these and the last one the tokens that are seen.
        if picked is None:
            there = (torch.arange(index_k.shape[1], device=q.device) + 1) * block <= place[:, None] + 1
            seen = torch.arange(k.shape[1], device=q.device) <= place[:, None]
            products = products_of_all(index_q, index_k)
        else:
            number = picked[:, :, 0].long()
            token = (number[..., None] * block + inside).flatten(-2)
            seen = (number >= 0).repeat_interleave(block, dim=-1) & (token <= place[:, None])
            there = (number >= 0) & ((number + 1) * block <= place[:, None] + 1)
            token = token.where(seen, token[..., :1].clamp(min=0).minimum(place[:, None]))
            products = index_q @ index_k[batch, number.where(there, 0)].mT
        products = products * index_scale
        scores = (weights[:, :, None] @ (products.relu() if relu else products))[:, :, 0]
        with torch.no_grad():
            q = q.unflatten(2, (k.shape[2], -1))
            if picked is None:
                logits = products_of_all(q, k.transpose(1, 2)) * scale
            else:
                logits = q @ k[batch, token].transpose(2, 3).mT * scale
            hidden = ~seen if picked is None else ~seen[:, :, None, None]
            hidden = hidden[:, None, None] if picked is None else hidden
            given = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).sum(dim=(2, 3)) / H
            if block > 1:
                given = given[..., : there.shape[-1] * block].unflatten(-1, (-1, block)).amax(-1)
                given = given.masked_fill(~there, 0)
                given = given / given.sum(-1, keepdim=True).clamp(min=torch.finfo(given.dtype).tiny)
        # Who sees no complete block hides nothing: a softmax over nothing has no gradient that is a number.
        nothing = ~there.any(-1, keepdim=True)
        told = scores.masked_fill(~(there | nothing), -torch.inf).log_softmax(dim=-1).masked_fill(~there, 0)
        return (torch.special.xlogy(given, given) - given * told).sum(-1)

    N = index_k.shape[1]
    if not N:
        # No block is complete: nothing to learn, and zeros that autograd finds its way through.
        return (index_q.sum(dim=(2, 3)) + weights.sum(-1)) * 0 + index_k.sum() * 0
    inside = torch.arange(block, device=q.device)
    size = T if picked is None else picked.shape[-1] * block
    gathered = 0 if picked is None else index_k.shape[2] + k.shape[2] * k.shape[3]
    rows = max(ROOM // (B * size * (H + weights.shape[2] + gathered)), 1)
    place = torch.arange(T, device=q.device)
    found = []
    with without_autocast(q):
        for begin in range(0, T, rows):
            end = min(begin + rows, T)
            part = slice(begin, end)
            each = (index_q[:, part], weights[:, part], q[:, part], place[part])
            keys = (index_k, k)
            if (
                picked is None
            ):  # no more than these queries see, and one block for those who see none that is complete
                keys = (index_k[:, : max(end // block, 1)], k[:, : max(end, block)])
            found.append(recomputed(some, *each, *keys, None if picked is None else picked[:, part]))
    return torch.cat(found, dim=1)


def _room(tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]) -> list[Tensor]:
    q, k, weights = tensors[:3]
    assert q is not None
    assert k is not None
    assert weights is not None
    return [q.new_empty(q.shape[:2], dtype=compute_dtype(q, k, weights))]


_LOSS = Uncompiled("indexer_loss", 6, 1, _of_sequences, _room)

IMPLEMENTATION = Implementation("torch", indexer_loss_torch)
