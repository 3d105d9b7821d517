"""Softmax attention in PyTorch: whole, cached and packed sequences, on its fused kernels.

Two variations keep to those kernels. A sliding window is worked off in blocks of queries, each with the keys that
its queries can see, so that time and memory grow with the tokens times the window. A sink is one key more. With a
forget gate no fused kernel serves: blocks of queries make their logits (`attention_gated`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.attention_call import AttentionCall, queries_of
from intarsia.ops.attention_gated import gated_attention
from intarsia.ops.blockwise import Blockwise
from intarsia.ops.choice import Implementation
from intarsia.ops.compiler import is_static
from intarsia.ops.finite import attended
from intarsia.ops.keys import Keys, Paged, entry_of, lengths_of, right_aligned, row_of
from intarsia.ops.sequences import Sequences
from intarsia.ops.uncompiled import Uncompiled

FEW = 8
"""Up to so many queries that follow others are computed without fused kernels where there are sinks; and so many of
several sequences together."""

SMALL = 1 << 16
"""So many numbers of each sequence are copied on a CPU to compute several sequences together."""

SHOWN = 1 << 24
"""Whether a query sees a key is written down for so many pairs at a time, or for one query: a mask of a long text's
piece would take more memory than its keys."""


def attention_torch(call: AttentionCall) -> Tensor:
    """`[B, T, H, V]` in the dtype of q."""
    q, k, v, c = call.q, call.k, call.v, call.log_gate
    if isinstance(k, Tensor) and isinstance(v, Tensor) and not isinstance(c, tuple | Paged):
        return _dense(call, q, k, v, c, call.seqs)
    # The last of a sequence's keys that its queries see.
    reach = None if call.window is None else call.window - 1

    def alone(n: int, q: Tensor) -> Tensor:
        last = None if reach is None else reach + q.shape[1]
        gate = None if c is None else row_of(c, n, last)
        return _dense(call, q, row_of(k, n, last), row_of(v, n, last), gate, None)

    def together(numbers: list[int], q: Tensor, size: int) -> Tensor:
        keys, values = (right_aligned(x, numbers, size).to(q.dtype) for x in (k, v))
        mask = shown(q.shape[1], [min(lengths_of(k)[n], size) for n in numbers], call.window, q.device)

        def attend(keys: Tensor, values: Tensor) -> Tensor:
            return _attend(q, keys, values, mask, scale=call.scale, sinks=call.sinks)

        return attended(attend, [keys], [values], queries=q, windows=[call.window, call.window])

    return by_sequence(q, call.seqs, k, alone, together if c is None else None, reach)


def by_sequence(
    q: Tensor,
    seqs: Sequences | None,
    keys: Keys,
    alone: Callable[[int, Tensor], Tensor],
    together: Callable[[list[int], Tensor, int], Tensor] | None,
    reach: int | None = None,
) -> Tensor:
    """The outputs of all sequences, laid as q is.

    Args:
        alone: of the number of a sequence and its queries `[1, T, H, K]`.
        together: of several that have equally few queries `[n, T, H, K]`, and of how many of their last keys; None:
            each is computed alone.
        reach: how many keys before its own a query sees; None: all.
    """
    parts = dict(queries_of(q, seqs))
    outputs: dict[int, Tensor] = {}
    alike: dict[int, list[int]] = {}
    for n, part in parts.items() if together is not None else ():
        # A number that a graph does not know is not asked for: each answer would be another graph.
        if torch.compiler.is_compiling() and not is_static(part.shape[1]):
            continue
        if part.shape[1] <= FEW:
            alike.setdefault(part.shape[1], []).append(n)
    lengths = lengths_of(keys)
    channels = math.prod(entry_of(keys).shape[2:])
    for T, numbers in alike.items():
        sizes = [lengths[n] if reach is None else min(lengths[n], reach + T) for n in numbers]
        most = max(sizes)
        # Room for the longest of each would be mostly empty where one is much longer than the others. And on a CPU the
        # calls cost more than the copies only as long as these are small.
        fit = len(numbers) * most <= 2 * sum(sizes) and (q.device.type != "cpu" or most * channels <= SMALL)
        if together is not None and len(numbers) > 1 and fit:
            rows = together(numbers, torch.cat([parts[n] for n in numbers]), most)
            outputs.update(zip(numbers, rows.split(1), strict=True))
    found = [outputs[n] if n in outputs else alone(n, part) for n, part in parts.items()]
    return torch.cat(found, dim=0 if seqs is None else 1)


def in_blocks(function: Callable[[int, int], Tensor], T: int, rows: int) -> Tensor:
    """The outputs `[B, T, ...]` of `function(begin, end)` for so many `rows` of T queries at a time."""
    if rows >= T:
        return function(0, T)
    return torch.cat([function(begin, min(begin + rows, T)) for begin in range(0, T, rows)], dim=1)


def shown(T: int, lengths: list[int], window: int | None, device: torch.device) -> Tensor:
    """Which keys the last T tokens of several sequences see, whose keys stand at the right of a common length:
    `[N, 1, T, S]` bool."""
    size = max(lengths)
    there = torch.arange(size, device=device) >= size - torch.tensor(lengths, device=device)[:, None]
    return visible(T, size, window, device) & there[:, None, None]


def _dense(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, seqs: Sequences | None
) -> Tensor:
    """Attention of queries `[B, T, H, K]` that are the last of S tokens, or of a packed row whose sequences have as
    many keys as queries."""
    window, sinks, scale = call.window, call.sinks, call.scale
    if c is not None:
        return gated_attention(q, k, v, c, scale=scale, window=window, sinks=sinks, seqs=seqs)
    if seqs is not None and (torch.compiler.is_compiling() or len(seqs.occupied) > 1):
        return _PACKED((q, k, v, sinks), seqs.lengths, (scale, window or 0))[0]
    return _alone(q, k, v, sinks, scale, window or 0)


def _alone(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, reach: float) -> Tensor:
    """Attention of one sequence; a window of 0 is none."""
    T, S = q.shape[1], k.shape[1]
    window = int(reach) or None

    def attend(k: Tensor, v: Tensor) -> Tensor:
        k, v = k.to(q.dtype), v.to(q.dtype)
        if window is not None and window < S:
            return _WINDOWED(None, (q, k, v, sinks), scale, window)
        if not 1 < T < S:
            return _attend(q, k, v, None, scale=scale, sinks=sinks)

        def block(begin: int, end: int) -> Tensor:
            seen = S - T + end
            mask = visible(end - begin, seen, None, q.device)
            return _attend(q[:, begin:end], k[:, :seen], v[:, :seen], mask, scale=scale, sinks=sinks)

        return in_blocks(block, T, max(SHOWN // S, 1))

    return attended(attend, [k], [v], queries=q, windows=[window, window])


def visible(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """Which of S keys each of the last T tokens sees, `[T, S]` bool."""
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return seen if window is None else seen.triu(S - T - window + 1)


def _windowed(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: float) -> Tensor:
    """Attention with a window that hides some of the keys, a block of queries after the other."""
    T, window = q.shape[1], int(window)
    # Of its keys a block needs `window` a query: as many rows as that waste half of the scores at most, and more
    # than some hundred would only make the mask larger.
    rows = min(max(window, 64), 512)
    before = -(-(window - 1) // rows)
    queries = q.split(rows, dim=1)
    past = min(k.shape[1] - T, window - 1)
    # Blocks are put together from pieces: the gradient of a piece is as large as the piece, and that of a slice as
    # large as all keys.
    lengths = [past, *(block.shape[1] for block in queries)]
    keys, values = (x[:, x.shape[1] - T - past :].split(lengths, dim=1) for x in (k, v))
    masks: dict[tuple[int, int], Tensor] = {}
    outputs = []
    for n, block in enumerate(queries):
        near = slice(max(n + 1 - before, 0), n + 2)
        r = block.shape[1]
        k_n, v_n = (torch.cat(x[near], dim=1)[:, -(r + window - 1) :] for x in (keys, values))
        size = r, k_n.shape[1]
        if r > 1 and size not in masks:
            masks[size] = visible(*size, window, q.device)
        outputs.append(_attend(block, k_n, v_n, masks.get(size), scale=scale, sinks=sinks))
    return torch.cat(outputs, dim=1)


_WINDOWED = Blockwise(
    "windowed_attention", 4, _windowed, lambda x: x[0].new_empty(*x[0].shape[:3], x[2].shape[3])
)


def _each(
    tensors: SequenceOf[Tensor | None], lengths: SequenceOf[int], numbers: SequenceOf[float]
) -> list[Tensor]:
    """Attention of packed sequences, one after the other; of equally long ones behind each other, at once: a call of a
    few dozen tokens takes longer than what it computes."""
    *packed, sinks = tensors
    runs = [(length, len(list(run))) for length, run in itertools.groupby(n for n in lengths if n)]
    parts = zip(*(x.split([T * n for T, n in runs], dim=1) for x in packed if x is not None), strict=True)
    found = []
    for (T, n), part in zip(runs, parts, strict=True):
        q, k, v = (x.unflatten(1, (n, T)).flatten(0, 1) for x in part)
        found.append(_alone(q, k, v, sinks, *numbers).flatten(0, 1)[None])
    return [torch.cat(found, dim=1)]


_PACKED = Uncompiled(
    "packed_attention", 4, 1, _each, lambda x, *_: [x[0].new_empty(*x[0].shape[:3], x[2].shape[3])]
)
"""In a graph one operator, whatever the number of sequences and their lengths: a loop over them would be unrolled into
a graph as long as they are many, and another one for each number of them."""


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, sinks: Tensor | None
) -> Tensor:
    """Attention of T queries to the keys that `mask` `[T, S]` or `[B, 1, T, S]` shows; without a mask one query to all
    keys, or as many queries as keys to those up to their own."""
    T, K, V = q.shape[1], q.shape[3], v.shape[3]
    # Said by a branch, which torch.compile decides: the fused kernels take no symbol for a truth value.
    causal = True if mask is None and T > 1 else False  # noqa: SIM210
    if sinks is not None:
        if T <= FEW and not causal:
            # The sink as a key costs a copy of all others, and a few queries cost little more than that.
            return _weigh(q, k, v, mask, scale=scale, sinks=sinks)
        q, k, v = _with_sink_key(q, k, v, scale=scale, sinks=sinks, causal=causal)
        K = q.shape[3]
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    # Fused kernels want keys and values of one size; zeros change neither scores nor what is kept of outputs.
    q, k, v = (F.pad(x, (0, max(K, V) - x.shape[3])) if K != V else x for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)[:, -T:, :, :V]


def _with_sink_key(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, sinks: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a key in front whose logit is the sink and whose value is zero.

    Channels of their own make its logit: the sink in each query, `1 / scale` in this key, zero in all others. The
    fused causal mask lets the first query see the first key alone, so a query is put in front as well there, the
    result of which is to be dropped.
    """
    B, T, H, K = q.shape
    HKV = k.shape[2]
    # Eight channels, since fused kernels want multiples of that; two of them hold 1 / scale to twice the digits.
    inverse = torch.tensor(1 / scale, dtype=torch.float64)
    high = inverse.to(k.dtype)
    low = (inverse - high).to(k.dtype)
    sink_key = F.pad(torch.stack([high, low]).to(k.device), (K, 6)).expand(B, 1, HKV, K + 8)
    q = torch.cat([q, sinks.to(q.dtype)[:, None].expand(B, T, H, 8)], dim=-1)
    if causal:
        q = F.pad(q, (0, 0, 0, 0, 1, 0))
    return q, torch.cat([sink_key, F.pad(k, (0, 8))], dim=1), F.pad(v, (0, 0, 0, 0, 1, 0))


def _weigh(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, sinks: Tensor) -> Tensor:
    """The same, written out, for a few queries: the keys and values are read where they are."""
    T, H, HKV = q.shape[1], q.shape[2], k.shape[2]
    group = H // HKV
    # The queries of all heads that share a key head are the rows of one product, which reads the keys once.
    rows = q.unflatten(2, (HKV, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    logits = (rows @ k.permute(0, 2, 3, 1)).unflatten(2, (group, T))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if mask is not None:
        # A mask of each sequence has a place for the heads, which are two dimensions here.
        logits = logits.masked_fill(~(mask if mask.dim() == 2 else mask[:, None]), -torch.inf)
    sink = sinks.to(logits.dtype).view(HKV, group, 1, 1).expand(*logits.shape[:-1], 1)
    weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1].to(q.dtype)
    o = weights.flatten(2, 3) @ v.transpose(1, 2)
    return o.unflatten(2, (group, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


IMPLEMENTATION = Implementation("torch", attention_torch)
