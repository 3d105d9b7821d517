"""The loss of an indexer that picks blocks in PyTorch, a block of queries at a time; a backward pass computes each
again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.blocks_loss_call import BlocksLossCall
from intarsia.ops.blockwise import products_of_all, recomputed
from intarsia.ops.choice import Implementation
from intarsia.ops.precision import compute_dtype, without_autocast
from intarsia.ops.uncompiled import Uncompiled

ROOM = 1 << 22
"""So many numbers of keys, products and weights are there at a time, or those of one query."""


def blocks_loss_torch(call: BlocksLossCall) -> Tensor:
    """`[B, T]`, float32 (float64 for float64)."""
    lengths = (call.index_q.shape[1],) if call.seqs is None else call.seqs.lengths
    tensors = (call.index_q, call.index_k, call.q.detach(), call.k.detach(), call.picked)
    return _LOSS(tensors, lengths, (call.block, call.index_scale, call.scale))[0]


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
    q: Tensor,
    k: Tensor,
    picked: Tensor | None,
    block: float,
    index_scale: float,
    scale: float,
) -> Tensor:
    """`[B, T]` of sequences of one length."""
    block, wide = int(block), compute_dtype(index_q, index_k)
    index_q, index_k = index_q.to(wide), index_k.to(wide)
    q, k = q.detach().to(wide), k.detach().to(wide)
    B, T, G = index_q.shape[:3]
    # Heads as [groups, key heads of each, query heads of each of these]; where groups share a key head, each has it.
    k = k.repeat_interleave(max(G // k.shape[2], 1), dim=2).unflatten(2, (G, -1))
    q = q.unflatten(2, (G, k.shape[3], -1))
    batch = torch.arange(B, device=q.device)[:, None, None, None]
    group = torch.arange(G, device=q.device)[:, None]
    inside = torch.arange(block, device=q.device)

    def some(
        index_q: Tensor, q: Tensor, place: Tensor, index_k: Tensor, k: Tensor, picked: Tensor | None
    ) -> Tensor:
        # Tokens `[.., R, G, n block]` that a query of a group may read, which lie block by block.
        if picked is None:
            room = -index_k.shape[1] % block
            seen = (torch.arange(index_k.shape[1] + room, device=q.device) <= place[:, None])[None, :, None]
            keys, of_heads = F.pad(index_k, (0, 0, 0, room)), F.pad(k.permute(0, 2, 3, 1, 4), (0, 0, 0, room))
            scores = (index_q.flatten(1, 2) @ keys.mT).unflatten(1, index_q.shape[1:3]) * index_scale
        else:
            token = (picked.long()[..., None] * block + inside).flatten(-2)
            seen = (picked >= 0).repeat_interleave(block, dim=-1) & (token <= place[:, None, None])
            token = token.where(seen, 0)
            keys = index_k[batch, token]
            of_heads = k[batch, token, group].transpose(3, 4)
            scores = (index_q[:, :, :, None] @ keys.mT)[:, :, :, 0] * index_scale
        there = seen.unflatten(-1, (-1, block)).any(-1)
        scores = scores.masked_fill(~seen, -torch.inf).unflatten(-1, (-1, block)).amax(-1)
        with torch.no_grad():
            # Who sees nothing hides nothing: a softmax over nothing is none.
            hidden = ~(seen | ~seen.any(-1, keepdim=True))
            logits = q @ of_heads.mT if picked is not None else products_of_all(q, of_heads)
            logits = (logits * scale).masked_fill(hidden[:, :, :, None, None], -torch.inf)
            given = logits.softmax(dim=-1).mean(dim=(3, 4)).masked_fill(~seen, 0)
            given = given.unflatten(-1, (-1, block)).amax(-1)
            given = given / given.sum(-1, keepdim=True).clamp(min=torch.finfo(given.dtype).tiny)
        nothing = ~there.any(-1, keepdim=True)
        told = scores.masked_fill(nothing, 0).log_softmax(dim=-1).masked_fill(~there, 0)
        return (torch.special.xlogy(given, given) - given * told).sum(-1).mean(-1)

    size = T if picked is None else picked.shape[-1] * block
    gathered = 0 if picked is None else G * (index_k.shape[2] + k.shape[3] * k.shape[4])
    rows = max(ROOM // (B * size * (q.shape[2] * q.shape[3] * q.shape[4] + G + gathered)), 1)
    place, found = torch.arange(T, device=q.device), []
    with without_autocast(q):
        for begin in range(0, T, rows):
            part = slice(begin, begin + rows)
            each, keys = (index_q[:, part], q[:, part], place[part]), (index_k, k)
            if picked is None:
                keys = (index_k[:, : begin + rows], k[:, : begin + rows])
            found.append(recomputed(some, *each, *keys, None if picked is None else picked[:, part]))
    return torch.cat(found, dim=1)


def _room(tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]) -> list[Tensor]:
    q, k = tensors[:2]
    assert q is not None
    assert k is not None
    return [q.new_empty(q.shape[:2], dtype=compute_dtype(q, k))]


_LOSS = Uncompiled("blocks_loss", 5, 1, _of_sequences, _room)

IMPLEMENTATION = Implementation("torch", blocks_loss_torch)
