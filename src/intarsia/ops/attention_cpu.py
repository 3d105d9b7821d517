"""Softmax attention to cached keys by the native kernels of `csrc/attend*`, in tensors and in pages.

The keys and values are read where they lie, once for all heads that share them; nothing is as large as queries times
keys. What a query gets depends on no later key and on no other query, to the bit: a text in one piece, in several, and
token by token come out alike.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.absorbed import absorbed
from intarsia.ops.attention_call import AttentionCall, LatentCall, queries_of
from intarsia.ops.keys import Keys, Paged, as_heads, between, entry_of, lengths_of, rows_of
from intarsia.ops.native_operator import Optional, edges_of, implementation, refuse, rows
from intarsia.ops.sequences import Sequences
from intarsia.ops.tracing import apart_from_torch
from intarsia.ops.widened import linear

DTYPES = (torch.float32, torch.bfloat16)


def attention_cpu(call: AttentionCall) -> Tensor:
    """`[B, T, H, V]` in the dtype of q."""
    return _attend(call.q, call.k, call.v, call.seqs, call.scale, call.window, call.sinks)


def attention_in_pages(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, lengths: list[int], scale: float
) -> Tensor:
    """`[R, H, V]` of single queries `[R, H, K]`, each of which sees the first `lengths` entries of a table of its own
    into pages of keys and values, `pages` `[R, most]`. Nothing of it is differentiated or traced."""
    return _run(
        rows(q), [rows(k)], [rows(v)], pages.contiguous(), list(range(len(lengths) + 1)), lengths,
        [0] * len(lengths), scale, 0, None,
    )  # fmt: skip


def latent_cpu(call: LatentCall) -> Tensor:
    """The same of latents, which all heads read as one shared key head. Or, for a sequence of many queries, the heads'
    keys and values are made of them, of so many at a time as a cache of the processor holds."""
    parts = dict(queries_of(call.q, call.seqs))
    many = [n for n, q in parts.items() if worth_expanding(call, q.shape[1])]
    if not many or not apart_from_torch(call.q, entry_of(call.latents), call.up):
        return _absorbed(call)
    found = {n: _expanded(call, n, parts[n]) for n in many}
    # Who brings a token beside one that reads a document does not pay for its own past to be made anew.
    few = [n for n in parts if n not in found]
    if few:
        q, lengths = torch.cat([parts[n] for n in few], dim=1), tuple(parts[n].shape[1] for n in few)
        o = _absorbed(replace(call, q=q, latents=rows_of(call.latents, few), seqs=Sequences(lengths)))
        found |= zip(few, o.split(lengths, dim=1), strict=True)
    outputs = [found[n] for n in parts]
    return torch.cat(outputs, dim=0 if call.seqs is None else 1) if len(outputs) > 1 else outputs[0]


def worth_expanding(call: LatentCall, tokens: int) -> bool:
    """Whether making keys and values for so many queries of a sequence costs less than it saves: a query and a key of a
    head take `K + V` products instead of `2 rank + shared`."""
    rank, made = call.rank, call.up.shape[1]
    if call.seqs is not None and isinstance(call.latents, Tensor):
        return False  # packed sequences without a past
    return tokens * (2 * rank - made) > rank * made


def _absorbed(call: LatentCall) -> Tensor:
    latents, values = as_heads(call.latents), as_heads(call.latents, call.rank)

    def read(wide: Tensor) -> Tensor:
        return _attend(wide, latents, values, call.seqs, call.scale, None, None)

    return absorbed(call.q, call.up, call.own, read)


EXPANDED = 4 << 20
"""Keys and values that are made at a time take so many bytes, or those of one of the kernels' chunks. With twice as
many a server's memory grew by 2.5 KB for each token of a document, since blocks of ever another size find no place that
an earlier one left."""


def _expanded(call: LatentCall, n: int, q: Tensor) -> Tensor:
    """Attention of the queries of one sequence `[1, T, H, K]` to its keys and values, which come a block at a time.
    What each query has so far is carried from one block to the next."""
    own, rank, H = call.own, call.rank, q.shape[2]
    S, V, up = lengths_of(call.latents)[n], call.up.shape[1] - own, call.up.to(q.dtype).flatten(0, 1)
    queries, kernels = rows(q[0]), native.native()
    isa, threads = native.instruction_set(), torch.get_num_threads()
    numbers = kernels.attend_carried(queries.detach(), V, isa)
    carried = torch.zeros(q.shape[1], H, numbers, dtype=torch.float32)
    carried[..., -2] = -torch.inf
    o = q.new_empty(q.shape[1], H, V)
    size = max(EXPANDED // (H * (q.shape[3] + V) * q.element_size()) // CHUNK, 1) * CHUNK
    for begin in range(0, S, size):
        end = min(begin + size, S)
        latents = between(call.latents, n, begin, end)
        kv = linear(latents[..., :rank], up).unflatten(-1, (H, -1))
        shared = latents[..., None, rank:].expand(-1, -1, H, -1)
        k = torch.cat([kv[..., :own], shared], dim=-1)
        kernels.attend(
            queries.detach(), [k.detach()], [kv[..., own:].detach()], None, [0, q.shape[1]], [S], [begin],
            call.scale, 0, None, o, carried, end == S, isa, threads,
        )  # fmt: skip
    return o[None]


CHUNK = 256
"""The keys that the kernels work on from nothing: where blocks end changes no bit if it is where such a chunk ends."""


def _attend(
    q: Tensor,
    k: Keys,
    v: Keys,
    seqs: Sequences | None,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    B, T, H = q.shape[:3]
    queries = rows(q.flatten(0, 1))
    lengths = [T] * B if seqs is None else list(seqs.lengths)
    pages, held = None, [0] * len(lengths)
    if isinstance(k, Paged):
        pages, held = k.table.pages.contiguous(), list(k.table.first)
    seen = lengths_of(k)
    keys, values = _tensors(k), _tensors(v)
    if seqs is not None and isinstance(k, Tensor):
        # Packed as the queries are: each sequence's own part.
        keys, values = (list(x[0].split(lengths, dim=1)) for x in (keys, values))
        seen = tuple(lengths)
    sinks = None if sinks is None else sinks.float().contiguous()
    run = _run if apart_from_torch(queries, *keys, *values, sinks) else torch.ops.intarsia.attend.default
    o = run(queries, keys, values, pages, edges_of(lengths), list(seen), held, scale, window or 0, sinks)
    return o.view(B, T, H, -1)


def _tensors(keys: Keys) -> list[Tensor]:
    tensors = [keys.pages] if isinstance(keys, Paged) else list(keys) if isinstance(keys, tuple) else [keys]
    return [rows(x) for x in tensors]


_library = torch.library.Library("intarsia", "FRAGMENT")
_library.define(
    "attend(Tensor q, Tensor[] k, Tensor[] v, Tensor? pages, SymInt[] edges, SymInt[] lengths, SymInt[] held,"
    " float scale, int window, Tensor? sinks) -> Tensor"
)


@torch.library.impl(_library, "attend", "CPU")
def _run(
    q: Tensor, k: list[Tensor], v: list[Tensor], pages: Optional, edges: list[int], lengths: list[int],
    held: list[int], scale: float, window: int, sinks: Optional,
) -> Tensor:  # fmt: skip
    o = q.new_empty((*q.shape[:2], v[0].shape[-1]))
    native.native().attend(
        q.detach(), [x.detach() for x in k], [x.detach() for x in v], pages, edges, lengths, held, scale, window,
        None if sinks is None else sinks.detach(), o, None, True, native.instruction_set(), torch.get_num_threads(),
    )  # fmt: skip
    return o


@torch.library.register_fake("intarsia::attend", lib=_library)
def _fake(
    q: Tensor, k: list[Tensor], v: list[Tensor], pages: Optional, edges: list[int], lengths: list[int],
    held: list[int], scale: float, window: int, sinks: Optional,
) -> Tensor:  # fmt: skip
    return q.new_empty((*q.shape[:2], v[0].shape[-1]))


def _refuse_attention(call: AttentionCall) -> str | None:
    if call.log_gate is not None:
        return "the kernels have no forget gate"
    if not _lie_alike(call.k, call.v):
        return "the kernels read keys and values from the same places: both tensors, or pages of one table"
    return _refuse(call.q, (call.k, call.v), call.sinks)


def _lie_alike(k: Keys, v: Keys) -> bool:
    if not isinstance(k, Paged) or not isinstance(v, Paged):
        return isinstance(k, Paged) == isinstance(v, Paged) and isinstance(k, tuple) == isinstance(v, tuple)
    return k.table is v.table or (
        k.table.first == v.table.first and torch.equal(k.table.pages, v.table.pages)
    )


def _refuse_latent(call: LatentCall) -> str | None:
    return _refuse(call.q, (call.latents,), call.up)


def _refuse(q: Tensor, keys: tuple[Keys, ...], other: Optional) -> str | None:
    if q.dtype not in DTYPES:
        return f"the kernels take float32 and bfloat16; q is {q.dtype}"
    tensors = [q, *([] if other is None else [other])]
    for each in keys:
        entry = entry_of(each)
        if entry.dtype != q.dtype:
            return f"the kernels read keys in the dtype of q, {q.dtype}; they are {entry.dtype}"
        tensors += [entry] if isinstance(each, Paged) else list(each) if isinstance(each, tuple) else [each]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "the kernels have no gradients"
    return refuse("q", q)


FEW = 16
"""Whole sequences of up to so many tokens are computed here: a call of PyTorch's kernels takes longer."""


def _whole(q: Tensor, keys: Keys) -> str | None:
    if isinstance(keys, Tensor) and q.shape[1] > FEW and q.shape[1] == keys.shape[1]:
        return "PyTorch's fused kernels are faster for whole sequences"
    return None


IMPLEMENTATION = replace(
    implementation(attention_cpu, _refuse_attention), yields=lambda call: _whole(call.q, call.k)
)
OF_LATENTS = replace(
    implementation(latent_cpu, _refuse_latent), yields=lambda call: _whole(call.q, call.latents)
)
