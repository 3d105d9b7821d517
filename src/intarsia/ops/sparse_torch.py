"""Sparse attention in PyTorch: what a block of queries picked is gathered, in tensors and in pages, and nothing else.

Of a block of queries the keys and values that they picked are there at a time; for a backward pass they are gathered
again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from intarsia.ops.blockwise import recomputed
from intarsia.ops.choice import Implementation
from intarsia.ops.keys import Keys, Paged, entry_of, lengths_of
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import SparseCall, SparseLatentCall, standing
from intarsia.ops.sparse_forms import one_by_one, to_keys, to_latents
from intarsia.ops.uncompiled import Uncompiled

GATHERED = 1 << 22
"""So many numbers of keys and values are gathered at a time, or those of one query."""


def sparse_torch(call: SparseCall) -> Tensor:
    """`[B, T, H, V]` in the dtype of q."""
    return to_keys(call, _sparse)


def sparse_latent_torch(call: SparseLatentCall) -> Tensor:
    """The same of latents."""
    return to_latents(call, _sparse)


def _sparse(
    q: Tensor,
    k: Keys,
    v: Keys | None,
    rank: int,
    picked: Tensor,
    block: int,
    scale: float,
    seqs: Sequences | None,
) -> Tensor:
    """Attention to what was picked. Without values they are the first `rank` channels of the keys."""
    whole = isinstance(k, Tensor) and (seqs is not None or q.shape[1] == k.shape[1])
    if whole and not isinstance(v, tuple | Paged):
        lengths = (q.shape[1],) if seqs is None else seqs.lengths
        return _WHOLE((q, k, v, picked), lengths, (rank, block, scale))[0]  # type: ignore[arg-type]
    together = isinstance(k, Tensor) if isinstance(v, Tensor) else isinstance(k, Paged) or v is None
    if isinstance(k, tuple) or isinstance(v, tuple) or not together:
        return one_by_one(_sparse, q, k, v, rank, picked, block, scale, seqs)
    number, place = standing(q.shape[1], lengths_of(k), seqs, q.device)
    take_v = None if v is None else _taker(v)
    return _attend(q, _taker(k), take_v, rank, picked, block, scale, number, place, *_sizes(k, v))


Taker = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the numbers of sequences, tokens and heads, each `[B, T, R, m]` or what is made so, to entries
`[B, T, R, m, ...]`."""


def _taker(keys: Keys) -> Taker:
    """What reads entries where they lie, in tensors `[B, S, heads, K]` or in pages."""
    if isinstance(keys, Paged):
        pages, table = keys.pages.flatten(0, 1), keys.table

        def from_pages(number: Tensor, token: Tensor, head: Tensor) -> Tensor:
            page = table.pages[number, token // table.page_size]
            return pages[page * table.page_size + token % table.page_size, head]

        return from_pages
    assert isinstance(keys, Tensor)
    if not keys.is_contiguous():
        return lambda number, token, head: keys[number, token, head]
    S, heads, rows = keys.shape[1], keys.shape[2], keys.flatten(0, 2)

    def from_rows(number: Tensor, token: Tensor, head: Tensor) -> Tensor:
        index = (number * S + token) * heads + head
        return rows.index_select(0, index.flatten()).unflatten(0, index.shape)

    return from_rows


def _sizes(k: Keys, v: Keys | None) -> tuple[int, int]:
    """The key heads, and the channels of a key and its value."""
    entry = entry_of(k)
    return entry.shape[2], entry.shape[3] + (0 if v is None else entry_of(v).shape[3])


def _attend(
    q: Tensor,
    take_k: Taker,
    take_v: Taker | None,
    rank: int,
    picked: Tensor,
    block: int,
    scale: float,
    number: Tensor,
    place: Tensor,
    heads: int,
    channels: int,
) -> Tensor:
    """Attention of queries `[B, T, H, K]` that stand at `place` of the sequences `number`, each `[B, T]`."""
    B, T = q.shape[:2]
    # Those that read the same entries: the query heads of a key head, or of what a group of them picked.
    readers = max(heads, picked.shape[2])
    head = torch.arange(readers, device=q.device) // (readers // heads)

    def some(q: Tensor, picked: Tensor, number: Tensor, place: Tensor) -> Tensor:
        token = picked.long()[..., None] * block + torch.arange(block, device=q.device)
        there = (picked[..., None] >= 0) & (token <= place[:, :, None, None, None])
        token, there = token.flatten(-2), there.flatten(-2)
        # In the place of what is not there stands one that is, so that nothing of other entries can come in.
        token = token.where(there, token[..., :1].clamp(min=0).minimum(place[:, :, None, None]))
        token, there = (x.repeat_interleave(readers // x.shape[2], dim=2) for x in (token, there))
        where = number[:, :, None, None].expand_as(token), token, head[:, None].expand_as(token)
        keys = take_k(*where).to(q.dtype)
        values = keys[..., :rank] if take_v is None else take_v(*where).to(q.dtype)
        rows = q.unflatten(2, (readers, -1))
        logits = rows @ keys.mT
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
        # Who picks nothing hides nothing: a softmax over nothing has no gradient that is a number.
        nothing = ~there.any(-1, keepdim=True)
        weights = logits.masked_fill(~(there | nothing)[..., None, :], -torch.inf).softmax(dim=-1).to(q.dtype)
        return (weights @ values).masked_fill(nothing[..., None], 0).flatten(2, 3)

    most = max(GATHERED // (B * readers * picked.shape[-1] * block * channels), 1)
    if most >= T:
        return some(q, picked, number, place)
    pieces = zip(*(x.split(most, dim=1) for x in (q, picked, number, place)), strict=True)
    return torch.cat([recomputed(some, *piece) for piece in pieces], dim=1)


def _whole(
    tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]
) -> list[Tensor]:
    """Attention within whole sequences, packed or not: all of them together."""
    q, k, v, picked = tensors
    assert q is not None
    assert k is not None
    assert picked is not None
    rank, block, scale = int(numbers[0]), int(numbers[1]), numbers[2]
    if q.shape[0] > 1 or len(lengths) == 1:
        number, place = standing(q.shape[1], (q.shape[1],) * q.shape[0], None, q.device)
        token_of = None
    else:
        seqs = Sequences(tuple(lengths))
        number, place = standing(q.shape[1], lengths, seqs, q.device)
        token_of = torch.tensor(seqs.starts, device=q.device)

    def within(keys: Tensor) -> Taker:
        take = _taker(keys.contiguous())
        if token_of is None:
            return take
        return lambda number, token, head: take(torch.zeros_like(number), token + token_of[number], head)

    take_v = None if v is None else within(v)
    return [_attend(q, within(k), take_v, rank, picked, block, scale, number, place, *_sizes(k, v))]


def _room(tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]) -> list[Tensor]:
    q, v = tensors[0], tensors[2]
    assert q is not None
    return [q.new_empty(*q.shape[:3], int(numbers[0]) if v is None else v.shape[3])]


_WHOLE = Uncompiled("sparse_attention", 4, 1, _whole, _room)

IMPLEMENTATION = Implementation("torch", sparse_torch)
OF_LATENTS = Implementation("torch", sparse_latent_torch)
