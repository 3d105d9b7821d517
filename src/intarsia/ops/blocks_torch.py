"""The selector of blocks in PyTorch: scores of a block of queries at a time, of which the best blocks are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.attention_call import queries_of
from intarsia.ops.blocks_call import BlocksCall, Pooling, Score
from intarsia.ops.choice import Implementation
from intarsia.ops.compiler import all_same
from intarsia.ops.keys import row_of
from intarsia.ops.precision import compute_dtype, without_autocast
from intarsia.ops.selection import first_best, rising
from intarsia.ops.uncompiled import Uncompiled

SCORES = 1 << 22
"""So many products of queries and keys are made at a time, or those of one query."""


@torch.no_grad()
def blocks_torch(call: BlocksCall) -> Tensor:
    """`[B, T, G, slots]` int32."""
    numbers = (
        call.count, call.block, call.groups, call.stride, call.width,
        call.score == "softmax", call.pooling == "sum", call.first, call.last, call.scale,
    )  # fmt: skip
    q, k = call.q.detach(), call.k
    if isinstance(k, Tensor):
        k = k.detach()
        if call.stride == 1 and q.shape[1] == k.shape[1]:
            lengths = (q.shape[1],) if call.seqs is None else call.seqs.lengths
            return _WHOLE([q, k], lengths, numbers)[0]
        if all_same(call.tokens):
            return _ONE([q, k], call.tokens[:1], numbers)[0]
    found = [
        _ONE([part, row_of(k, n)], (call.tokens[n],), numbers)[0] for n, part in queries_of(q, call.seqs)
    ]
    return _joined(found, call.slots, 0 if call.seqs is None else 1)


def _chosen(
    q: Tensor, k: Tensor, tokens: int, count: float, block: float, groups: float, stride: float, width: float,
    softmax: float, summed: float, first: float, last: float, scale: float,
) -> Tensor:  # fmt: skip
    """`[B, T, G, n]` of T queries, the last of so many tokens, with a key `[B, S, heads, K]` of each `stride`."""
    count, block, groups, stride = int(count), int(block), int(groups), int(stride)
    score: Score = "softmax" if softmax else "product"
    pooling: Pooling = "sum" if summed else "max"
    B, T, H = q.shape[:3]
    q, k = (x.to(compute_dtype(q, k)) for x in (q, k))
    # A group of heads is a row of its own, and so is a head that shares its key with others.
    q, k = q.transpose(1, 2) * scale, k.transpose(1, 2)
    slots = min(count, -(-tokens // block))
    rows, found = max(SCORES // max(B * H * k.shape[2], 1), 1), []
    wide, size = int(width) // stride, block // stride
    with without_autocast(q):
        for begin in range(0, T, rows):
            end = min(begin + rows, T)
            place = torch.arange(tokens - T + begin, tokens - T + end, device=q.device)
            keys = k[:, :, : (tokens - T + end) // stride]
            number = torch.arange(keys.shape[2], device=q.device)
            seen = (number >= wide - 1) & ((number + 1) * stride <= place[:, None] + 1)
            products = (q[:, :, begin:end].unflatten(1, (k.shape[1], -1)) @ keys[:, :, None].mT).flatten(1, 2)
            of_groups = _grouped(products, seen, groups, score)
            blocks = -(-(tokens - T + end) // block)
            values = _pooled(of_groups, seen, blocks, size, wide, pooling)
            best = _best(values, place // block, count, int(first), int(last))
            found.append(F.pad(best, (0, slots - best.shape[-1]), value=-1))
    return torch.cat(found, dim=2).transpose(1, 2)


def _grouped(products: Tensor, seen: Tensor, groups: int, score: Score) -> Tensor:
    """Scores of keys `[B, G, T, S]` of products `[B, H, T, S]`: -inf where a query does not see them."""
    if score == "softmax":
        # Where nothing is seen nothing is hidden: such a row has no softmax, and no block of it counts.
        hidden = ~(seen | ~seen.any(-1, keepdim=True))
        products = products.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    summed = products.unflatten(1, (groups, -1)).sum(2)
    return summed.masked_fill(~seen, -torch.inf)


def _pooled(scores: Tensor, seen: Tensor, blocks: int, size: int, wide: int, pooling: Pooling) -> Tensor:
    """Scores of blocks `[B, G, T, N]`: -inf where a query sees no key that has a token of them. Block b has something
    in common with the keys from `b size` to `(b + 1) size + wide - 2`."""
    room = blocks * size + wide - 1 - scores.shape[-1]
    largest = torch.finfo(scores.dtype).max
    values = F.pad(scores.nan_to_num(largest, largest, -torch.inf), (0, room), value=-torch.inf)
    values = values.unfold(-1, size + wide - 1, size)
    top = values.amax(-1)
    if pooling == "max":
        return top
    place = torch.arange(size + wide - 1, device=scores.device)
    common = place.clamp(max=size - 1) - (place - wide + 1).clamp(min=0) + 1
    summed = (values.masked_fill(values == -torch.inf, 0) * common).sum(-1).clamp(-largest, largest)
    return summed.masked_fill(top == -torch.inf, -torch.inf)


def _best(values: Tensor, own: Tensor, count: int, first: int, last: int) -> Tensor:
    """The best blocks `[B, G, T, n]` of queries that stand in the blocks `own` `[T]`."""
    number = torch.arange(values.shape[-1], device=values.device)
    always = (number < first) | (number > own[:, None] - last)
    always = always & (number <= own[:, None])
    values = values.masked_fill(always, torch.inf)
    best = first_best(values, count, (own + 1).expand(values.shape[:-1]))
    # What is left where too few can be picked has no score.
    picked = values.gather(-1, best.long().clamp(min=0)) > -torch.inf
    return rising(best.masked_fill(~picked, -1))


def _joined(found: Sequence[Tensor], slots: int, dim: int) -> Tensor:
    """What sequences chose, each with so many slots."""
    return torch.cat([F.pad(x, (0, slots - x.shape[-1]), value=-1) for x in found], dim=dim)


def _whole(
    tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]
) -> list[Tensor]:
    """The choices of whole sequences with a key of each token, one after the other."""
    q, k = (x for x in tensors if x is not None)
    occupied = [n for n in lengths if n]
    parts = zip(q.split(occupied, dim=1), k.split(occupied, dim=1), strict=True)
    found = [_chosen(each, keys, each.shape[1], *numbers) for each, keys in parts]
    return [_joined(found, min(int(numbers[0]), -(-max(occupied) // int(numbers[1]))), 1)]


def _one(tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]) -> list[Tensor]:
    """The choices of queries that are the last of `lengths[0]` tokens, with a key of each stride."""
    q, k = (x for x in tensors if x is not None)
    return [_chosen(q, k, lengths[0], *numbers)]


def _room(tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]) -> list[Tensor]:
    q = tensors[0]
    assert q is not None
    longest = lengths[0]
    for n in lengths[1:]:
        longest = torch.sym_max(longest, n)
    blocks = (longest + int(numbers[1]) - 1) // int(numbers[1])
    slots = torch.sym_min(int(numbers[0]), blocks)
    return [q.new_empty((*q.shape[:2], int(numbers[2]), slots), dtype=torch.int32)]


_WHOLE = Uncompiled("pick_blocks", 2, 1, _whole, _room)
_ONE = Uncompiled("pick_blocks_of_strides", 2, 1, _one, _room)

IMPLEMENTATION = Implementation("torch", blocks_torch)
