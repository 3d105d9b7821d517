"""The lightning indexer in PyTorch: scores of a block of queries at a time, of which the best are kept.

All pairs of a query and a key are scored, and no more than `SCORES` of them are there at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.attention_call import queries_of
from intarsia.ops.choice import Implementation
from intarsia.ops.compiler import all_same
from intarsia.ops.keys import entry_of, row_of
from intarsia.ops.precision import compute_dtype, without_autocast
from intarsia.ops.selection import first_best, with_tail
from intarsia.ops.sparse_call import IndexerCall
from intarsia.ops.uncompiled import Uncompiled

SCORES = 1 << 22
"""So many products of queries and keys are made at a time, or those of one query."""


@torch.no_grad()
def indexer_torch(call: IndexerCall) -> Tensor:
    """`[B, T, 1, slots]` int32."""
    numbers = (call.count, call.block, call.relu, call.scale)
    of_tokens = call.block == 1 and call.q.shape[1] == entry_of(call.k).shape[1]
    if isinstance(call.k, Tensor) and (call.seqs is not None or of_tokens):
        lengths = (call.q.shape[1],) if call.seqs is None else call.seqs.lengths
        return _WHOLE([x.detach() for x in (call.q, call.k, call.weights)], lengths, numbers)[0]
    if isinstance(call.k, Tensor) and all_same(call.tokens):
        return _ONE([x.detach() for x in (call.q, call.k, call.weights)], call.tokens[:1], numbers)[0]
    weights = dict(queries_of(call.weights[..., None], call.seqs))
    found = [
        _ONE([q, row_of(call.k, n), weights[n][..., 0]], (call.tokens[n],), numbers)[0]
        for n, q in queries_of(call.q, call.seqs)
    ]
    return _joined(found, call.slots, 0 if call.seqs is None else 1)


CACHED = 1 << 17
"""Of a few queries so many products are made and summed before the next ones: they do not leave the caches."""


def index_scores(q: Tensor, k: Tensor, weights: Tensor, relu: float, scale: float) -> Tensor:
    """`I` `[B, T, S]` of queries `[B, T, H, K]` and weights `[B, T, H]` in one wide dtype, and keys `[B, S, K]` that
    are widened as they come."""
    B, T, H = q.shape[:3]
    q, found = (q * scale).flatten(1, 2), []
    for keys in k.split(max(CACHED // (B * T * H), 256), dim=1):
        products = q @ keys.to(q.dtype).mT
        if relu:
            products.relu_()
        found.append((weights[:, :, None] @ products.unflatten(1, (T, H)))[:, :, 0])
    return torch.cat(found, dim=-1)


def _chosen(
    q: Tensor, k: Tensor, weights: Tensor, tokens: int, count: float, block: float, relu: float, scale: float
) -> Tensor:
    """`[B, T, 1, n]` of T queries, the last of so many tokens, with an index key `[B, S, K]` of each block of them."""
    count, block = int(count), int(block)
    B, T, H = q.shape[:3]
    wide = compute_dtype(q, k, weights)
    q, weights = q.to(wide), weights.to(wide)
    rows = max(SCORES // max(B * H * k.shape[1], 1), 1)
    found = []
    with without_autocast(q):
        for begin in range(0, T, rows):
            end = min(begin + rows, T)
            seen = torch.arange(tokens - T + begin + 1, tokens - T + end + 1, device=q.device)
            keys = k[:, : (tokens - T + end) // block]
            scores = index_scores(q[:, begin:end], keys, weights[:, begin:end], relu, scale)
            best = first_best(scores, count, (seen // block).expand(B, -1))
            # Each block of queries sees more keys than the one before it.
            best = F.pad(best, (0, min(count, k.shape[1]) - best.shape[-1]), value=-1)
            found.append(best if block == 1 else with_tail(best, seen.expand(B, -1), block))
    return torch.cat(found, dim=1)[:, :, None]


def _joined(found: Sequence[Tensor], slots: int, dim: int) -> Tensor:
    """What sequences chose, each with so many slots."""
    return torch.cat([F.pad(x, (0, slots - x.shape[-1]), value=-1) for x in found], dim=dim)


def _whole(
    tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]
) -> list[Tensor]:
    """The choices of whole sequences, one after the other."""
    q, k, weights = (x for x in tensors if x is not None)
    occupied = [n for n in lengths if n]
    count, block, relu, scale = numbers
    parts = zip(*(x.split(occupied, dim=1) for x in (q, k, weights)), strict=True)
    found = [_chosen(q, k, w, q.shape[1], count, block, relu, scale) for q, k, w in parts]
    return [_joined(found, min(int(numbers[0]), max(occupied)), 1)]


def _room(tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]) -> list[Tensor]:
    q = tensors[0]
    assert q is not None
    longest = lengths[0]
    for n in lengths[1:]:
        longest = torch.sym_max(longest, n)
    return [q.new_empty((*q.shape[:2], 1, torch.sym_min(int(numbers[0]), longest)), dtype=torch.int32)]


def _one(tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]) -> list[Tensor]:
    """The choices of queries that are the last of `lengths[0]` tokens, with a key of each block."""
    q, k, weights = (x for x in tensors if x is not None)
    count, block, relu, scale = numbers
    return [_chosen(q, k, weights, lengths[0], count, block, relu, scale)]


def _room_of_one(
    tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]
) -> list[Tensor]:
    q, k = tensors[:2]
    assert q is not None
    assert k is not None
    slots = torch.sym_min(int(numbers[0]), k.shape[1]) + (numbers[1] > 1)
    return [q.new_empty((*q.shape[:2], 1, slots), dtype=torch.int32)]


_WHOLE = Uncompiled("lightning_indexer", 3, 1, _whole, _room)
_ONE = Uncompiled("lightning_indexer_of_blocks", 3, 1, _one, _room_of_one)

IMPLEMENTATION = Implementation("torch", indexer_torch)
