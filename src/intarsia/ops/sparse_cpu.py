"""Sparse attention by the native kernels of softmax attention, which read what a query picked as a sequence of its own.

It is read where it lies, in tensors and in pages, by a table of each query's own: nothing is copied together, and
nothing else is touched. What a query gets depends on what it picked alone, to the bit.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from intarsia.ops.attention_cpu import DTYPES, attention_in_pages
from intarsia.ops.attention_cpu import IMPLEMENTATION as DENSE
from intarsia.ops.attention_cpu import OF_LATENTS as DENSE_OF_LATENTS
from intarsia.ops.keys import Keys, Paged, entry_of, lengths_of
from intarsia.ops.native_operator import implementation, refuse
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import SparseCall, SparseLatentCall, standing
from intarsia.ops.sparse_forms import one_by_one, to_keys, to_latents
from intarsia.ops.sparse_gathered import gathered
from intarsia.ops.tracing import observed

PLACES = 1 << 20
"""Tables of so many places are there at a time, or those of one query."""


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
    if isinstance(k, tuple) or not _end_to_end(k, v):
        return one_by_one(_sparse, q, k, v, rank, picked, block, scale, seqs)
    # Packed as the queries are, or keys of each sequence.
    starts = seqs.starts if isinstance(k, Tensor) and seqs is not None else None
    lengths = lengths_of(k) if starts is None or seqs is None else seqs.lengths
    number, place = standing(q.shape[1], lengths, seqs, q.device)
    size = _page_size(k, block, starts)
    keys = _in_pages(k, size)
    values = keys[..., :rank] if v is None else _in_pages(v, size)
    rows = max(PLACES // (picked[:, 0].numel() * (block // size)), 1)
    pieces = zip(*(x.split(rows, dim=1) for x in (q, picked, number, place)), strict=True)
    found = []
    for own, chosen, n, at in pieces:
        first, counts = _seen(chosen, at, block, size)
        pages = _places(k, n[:, :, None, None].expand_as(first), first, starts) // size
        found.append(_of_queries(own, keys, values, pages, counts, scale))
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def _end_to_end(*each: Keys | None) -> bool:
    """Whether sequences lie one behind the other, so that a table finds them all."""
    return all(
        not isinstance(x, Tensor) or x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in each
    )


def _page_size(keys: Keys, block: int, starts: tuple[int, ...] | None) -> int:
    """How many entries of a block always lie together."""
    if isinstance(keys, Paged):
        return gcd(block, keys.table.page_size)
    return gcd(block, keys.shape[1], *(starts or ())) if isinstance(keys, Tensor) else 1


def _in_pages(keys: Keys, size: int) -> Tensor:
    """Entries as pages of so many, `[pages, size, heads, channels]`: a view."""
    x = entry_of(keys)
    return x if x.shape[1] == size else x.unflatten(1, (-1, size)).flatten(0, 1)


def _seen(picked: Tensor, place: Tensor, block: int, size: int) -> tuple[Tensor, Tensor]:
    """Of the pages of what was picked the first tokens, rising, `[B, T, G, pages]`, and how many tokens of them all a
    query sees, `[B, T, G]`: pages behind those are to be left alone."""
    place = place[:, :, None, None]
    nothing = torch.iinfo(torch.int64).max // block
    number = picked.long()
    number = number.where((number >= 0) & (number * block <= place), nothing).sort(dim=-1).values
    first = number.where(number < nothing, place // block + 1)[..., None] * block
    first = (first + torch.arange(0, block, size)).flatten(-2)
    counts = (place + 1 - first).clamp(0, size).sum(-1)
    return first.where(first <= place, 0), counts


def _of_queries(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, counts: Tensor, scale: float
) -> Tensor:
    """Attention of each query `[B, T, H, K]` and group to so many entries of its pages."""
    heads, groups = keys.shape[2], pages.shape[2]
    # Those that read the same entries: the query heads of a key head, or of what a group of them picked.
    readers = max(heads, groups)
    each = readers // heads
    asked = q.unflatten(2, (readers, -1))
    found = []
    for head in range(heads):
        own = slice(head * groups // heads, head * groups // heads + each)
        rows, table = (
            asked[:, :, head * each : (head + 1) * each].flatten(0, 2),
            pages[:, :, own].flatten(0, 2),
        )
        seen = counts[:, :, own].flatten().tolist()
        k, v = keys[:, :, head : head + 1], values[:, :, head : head + 1]
        o = rows.new_zeros(*rows.shape[:2], v.shape[-1])
        busy = [n for n, count in enumerate(seen) if count]
        if len(busy) == len(seen):
            o = attention_in_pages(rows, k, v, table, seen, scale)
        elif busy:
            o[busy] = attention_in_pages(rows[busy], k, v, table[busy], [seen[n] for n in busy], scale)
        found.append(o.unflatten(0, (*q.shape[:2], each)))
    return torch.cat(found, dim=2).flatten(2, 3)


def _places(keys: Keys, number: Tensor, token: Tensor, starts: tuple[int, ...] | None) -> Tensor:
    """Where tokens of sequences lie among the rows of a tensor, or of pages laid end to end."""
    if isinstance(keys, Paged):
        table = keys.table
        return table.pages[number, token // table.page_size] * table.page_size + token % table.page_size
    if starts is not None:
        return torch.tensor(starts)[number] + token
    return number * lengths_of(keys)[0] + token


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
