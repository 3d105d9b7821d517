"""The choice of blocks and tokens by the native kernels of `csrc/pick*`.

Index keys are read where they lie, in tensors and in pages, and of many queries PyTorch's products are made. Nothing is
as large as queries times keys: so many products are there at a time as `SCORES` says, or those of one query.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.attention_call import queries_of
from intarsia.ops.blocks_call import BlocksCall
from intarsia.ops.choice import Implementation
from intarsia.ops.keys import Keys, Paged, as_heads, entry_of, row_of
from intarsia.ops.native_operator import implementation, refuse
from intarsia.ops.precision import without_autocast
from intarsia.ops.sequences import Sequences
from intarsia.ops.sparse_call import IndexerCall
from intarsia.ops.tracing import observed

SCORES = 1 << 22
FEW = 4
"""Up to so many queries of a sequence are multiplied with its keys where these lie: others with a copy in float32."""
DTYPES = (torch.float32, torch.bfloat16)


@torch.no_grad()
def blocks_cpu(call: BlocksCall) -> Tensor:
    """`[B, T, G, slots]` int32."""
    found = call.q.new_empty((*call.q.shape[:2], call.groups, call.slots), dtype=torch.int32)
    kernels, isa, threads = native.native(), native.instruction_set(), torch.get_num_threads()
    for products, _, place, out in _rows(
        call.q, call.k, None, call.scale, call.stride, call.tokens, call.seqs, found
    ):
        kernels.pick(
            products, None, place, call.stride, call.width, call.block, call.groups, call.count, call.first,
            call.last, call.score == "softmax", call.pooling == "sum", False, False, out, isa, threads,
        )  # fmt: skip
    return found


@torch.no_grad()
def indexer_cpu(call: IndexerCall) -> Tensor:
    """`[B, T, 1, slots]` int32."""
    found = call.q.new_empty((*call.q.shape[:2], 1, call.slots), dtype=torch.int32)
    kernels, isa, threads = native.native(), native.instruction_set(), torch.get_num_threads()
    keys = as_heads(call.k)
    rows = _rows(call.q, keys, call.weights, call.scale, call.block, call.tokens, call.seqs, found)
    for products, weights, place, out in rows:
        kernels.pick(
            products, weights, place, call.block, call.block, call.block, 1, call.count, 0, 0, False, False,
            call.relu, True, out, isa, threads,
        )  # fmt: skip
    return found


def _rows(
    q: Tensor,
    k: Keys,
    weights: Tensor | None,
    scale: float,
    stride: int,
    tokens: tuple[int, ...],
    seqs: Sequences | None,
    found: Tensor,
) -> Iterator[tuple[Tensor, Tensor | None, int, Tensor]]:
    """Of some queries of a sequence at a time the products `[T, H, S]` with the keys, the heads' weights, the place of
    the first in its sequence, and where what they pick belongs."""
    into = dict(queries_of(found, seqs))
    given = {} if weights is None else dict(queries_of(weights[..., None], seqs))
    for n, part in queries_of(q, seqs):
        T, H, keys = part.shape[1], part.shape[2], tokens[n] // stride
        asked = (part[0].float() * scale).contiguous()
        w = given[n][0, ..., 0].float().contiguous() if given else None
        wide = None if T <= FEW else _wide(k, n, seqs)
        most = max(SCORES // max(H * keys, 1), 1)
        for begin in range(0, T, most):
            end = min(begin + most, T)
            seen = (tokens[n] - T + end) // stride
            rows = asked[begin:end]
            products = _products_of(k, n, seqs, rows, seen) if wide is None else _products(wide, rows, seen)
            out = into[n][0, begin:end]
            own = out if out.is_contiguous() else out.contiguous()
            yield products, None if w is None else w[begin:end], tokens[n] - T + begin, own
            if own is not out:
                out.copy_(own)


def _of_sequence(k: Keys, n: int, seqs: Sequences | None) -> Tensor:
    """The keys `[S, heads, K]` of sequence n."""
    if isinstance(k, Tensor) and seqs is not None:
        return k[0, seqs.starts[n] :][: seqs.lengths[n]]
    return row_of(k, n)[0]


def _wide(k: Keys, n: int, seqs: Sequences | None) -> Tensor:
    """The same in float32, `[heads, K, S]`."""
    return _of_sequence(k, n, seqs).detach().float().permute(1, 2, 0).contiguous()


def _products(keys: Tensor, q: Tensor, seen: int) -> Tensor:
    """`[T, H, seen]` of queries `[T, H, K]` and keys `[heads, K, S]`."""
    T, H, K = q.shape
    heads = keys.shape[0]
    with without_autocast(q):
        if heads == 1:
            return (q.view(T * H, K) @ keys[0, :, :seen]).view(T, H, seen)
        of_heads = q.view(T, heads, H // heads, K).transpose(0, 1).reshape(heads, -1, K) @ keys[..., :seen]
        return of_heads.unflatten(1, (T, -1)).transpose(0, 1).reshape(T, H, seen)


def _products_of(k: Keys, n: int, seqs: Sequences | None, q: Tensor, seen: int) -> Tensor:
    """The same by the kernels, of keys where they lie."""
    products = q.new_empty(q.shape[0], q.shape[1], seen)
    pages = k.table.pages[n].contiguous() if isinstance(k, Paged) else None
    keys = k.pages if isinstance(k, Paged) else _of_sequence(k, n, seqs)
    keys = keys if keys.stride(-1) == 1 or keys.shape[-1] == 1 else keys.contiguous()
    native.native().pick_products(
        q, keys.detach(), pages, seen, products, native.instruction_set(), torch.get_num_threads()
    )
    return products


def _refuse(call: BlocksCall | IndexerCall) -> str | None:
    if observed():
        return (
            "how much is scored at a time is found as it runs, which nothing that traces a program can follow"
        )
    for name, dtype in (("q", call.q.dtype), ("k", entry_of(call.k).dtype)):
        if dtype not in DTYPES:
            return f"the kernels score in float32; {name} is {dtype}"
    if isinstance(call, IndexerCall) and call.weights.dtype == torch.float64:
        return "the kernels score in float32; weights are torch.float64"
    return refuse("q", call.q)


BLOCKS: Implementation = implementation(blocks_cpu, _refuse)
INDEXER: Implementation = implementation(indexer_cpu, _refuse)
