"""Sparse attention by the native kernels of softmax attention, which read what a query picked as a sequence of its own.

What was picked is copied together, of a block of queries at a time: from tensors and from pages, and nothing else is
touched. What a query gets depends on what it picked alone, to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.attention_call import AttentionCall
from intarsia.ops.attention_cpu import DTYPES, attention_cpu
from intarsia.ops.attention_cpu import IMPLEMENTATION as DENSE
from intarsia.ops.attention_cpu import OF_LATENTS as DENSE_OF_LATENTS
from intarsia.ops.keys import Keys, Paged, entry_of, lengths_of
from intarsia.ops.native_operator import implementation, refuse
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import SparseCall, SparseLatentCall, standing
from intarsia.ops.sparse_forms import one_by_one, to_keys, to_latents
from intarsia.ops.sparse_gathered import gathered
from intarsia.ops.tracing import observed

GATHERED = 1 << 22
"""So many numbers of keys and values are copied at a time, or those of one query."""


def sparse_cpu(call: SparseCall) -> Tensor:
    """`[B, T, H, V]` in the dtype of q."""
    return to_keys(call, _sparse)


def sparse_latent_cpu(call: SparseLatentCall) -> Tensor:
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
    if _has_gradients(q, k, v):
        assert isinstance(k, Tensor)
        assert not isinstance(v, tuple | Paged)
        lengths = (q.shape[1],) if seqs is None else seqs.lengths
        return gathered(q, k, k[..., :rank] if v is None else v, picked, lengths, block, scale)
    if isinstance(k, tuple):
        return one_by_one(_sparse, q, k, v, rank, picked, block, scale, seqs)
    # Packed as the queries are, or keys of each sequence.
    packed = seqs if isinstance(k, Tensor) else None
    lengths = lengths_of(k) if packed is None else packed.lengths
    number, place = standing(q.shape[1], lengths, seqs, q.device)
    heads = entry_of(k).shape[2]
    readers = max(heads, picked.shape[2])
    numbers = sum(entry_of(x).shape[3] for x in (k, v) if x is not None)
    rows = max(GATHERED // (q.shape[0] * readers * picked.shape[-1] * block * numbers), 1)
    starts = None if packed is None else torch.tensor(packed.starts)
    pieces = zip(*(x.split(rows, dim=1) for x in (q, picked, number, place)), strict=True)
    found = [_of_block(own, chosen, n, at, k, v, rank, block, scale, starts) for own, chosen, n, at in pieces]
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def _of_block(
    q: Tensor,
    picked: Tensor,
    number: Tensor,
    place: Tensor,
    k: Keys,
    v: Keys | None,
    rank: int,
    block: int,
    scale: float,
    starts: Tensor | None,
) -> Tensor:
    """Attention of queries that stand at `place` of the sequences `number`, each `[B, T]`."""
    B, T = q.shape[:2]
    heads = entry_of(k).shape[2]
    # Those that read the same entries: the query heads of a key head, or of what a group of them picked.
    readers = max(heads, picked.shape[2])
    token = picked.long()[..., None] * block + torch.arange(block)
    there = (picked[..., None] >= 0) & (token <= place[:, :, None, None, None])
    token, there = (x.flatten(-2).repeat_interleave(readers // x.shape[2], dim=2) for x in (token, there))
    counts = there.sum(-1).flatten().tolist()
    head = (torch.arange(readers) // (readers // heads))[:, None].expand_as(token)[there]
    places = _places(k, number[:, :, None, None].expand_as(token)[there], token[there], starts)
    keys = _read(k, places, head)
    values = keys[:, :rank] if v is None else _read(v, places, head)
    rows = q.unflatten(2, (readers, -1)).flatten(0, 2)
    busy = [n for n, count in enumerate(counts) if count]
    o = q.new_zeros(*rows.shape[:2], values.shape[1])
    if busy:
        each = [counts[n] for n in busy]
        own_keys, own_values = (tuple(part[None, :, None] for part in x.split(each)) for x in (keys, values))
        asked = rows if len(busy) == len(counts) else rows[busy]
        call = AttentionCall(
            asked[None], own_keys, own_values, scale, None, None, None, Sequences((1,) * len(busy))
        )
        found = attention_cpu(call)[0]
        if len(busy) == len(counts):
            o = found
        else:
            o[busy] = found
    return o.unflatten(0, (B, T, readers)).flatten(2, 3)


def _places(keys: Keys, number: Tensor, token: Tensor, starts: Tensor | None) -> Tensor:
    """Where tokens of sequences lie among the rows of a tensor, or of pages laid end to end."""
    if isinstance(keys, Paged):
        table = keys.table
        return table.pages[number, token // table.page_size] * table.page_size + token % table.page_size
    if starts is not None:
        return starts[number] + token
    return number * lengths_of(keys)[0] + token


def _read(keys: Keys, places: Tensor, head: Tensor) -> Tensor:
    """The entries of some rows and heads, `[n, channels]`."""
    entry = entry_of(keys)
    if entry.is_contiguous():
        rows = entry.flatten(0, 2)
        return rows.index_select(0, places if entry.shape[2] == 1 else places * entry.shape[2] + head)
    return entry[places // entry.shape[1], places % entry.shape[1], head]


def _has_gradients(*tensors: Keys | None) -> bool:
    """Whether something is to be differentiated."""
    if not torch.is_grad_enabled():
        return False
    each = [x if isinstance(x, tuple) else (entry_of(x),) for x in tensors if x is not None]
    return any(x.requires_grad for parts in each for x in parts)


def _refuse(call: SparseCall) -> str | None:
    dense = call.dense
    if _has_gradients(dense.q, dense.k, dense.v):
        return _watched() or _refuse_gradients(dense.q, dense.k, dense.v, dense.seqs)
    return _watched() or DENSE.refuse(dense)


def _refuse_latent(call: SparseLatentCall) -> str | None:
    dense = call.dense
    if _has_gradients(dense.q, dense.latents, dense.up):
        return _watched() or _refuse_gradients(dense.q, dense.latents, dense.latents, dense.seqs)
    return _watched() or DENSE_OF_LATENTS.refuse(dense)


def _refuse_gradients(q: Tensor, k: Keys, v: Keys, seqs: Sequences | None) -> str | None:
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)) or (seqs is None and k.shape[1] != q.shape[1]):
        return "the kernels have gradients of whole sequences, and of none that others come before"
    odd = next((x.dtype for x in (q, k, v) if x.dtype not in DTYPES), None)
    return f"the kernels take float32 and bfloat16; there is {odd}" if odd else refuse("q", q)


def _watched() -> str | None:
    if observed():
        return "how much is read is found as it runs, which nothing that traces a program can follow"
    return None


IMPLEMENTATION = implementation(sparse_cpu, _refuse)
OF_LATENTS = implementation(sparse_latent_cpu, _refuse_latent)
