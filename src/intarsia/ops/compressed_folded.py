"""Attention to compressed keys as softmax attention.

The queries of `stride` tokens in a row that see the same keys are one query with as many more heads. Folded so, the
queries are the last of their sequence's keys as those of softmax attention are, whose forms compute the rest: causal,
whole, cached, ragged and paged, forward and backward. Queries that see no key are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops import attention_cpu, attention_torch
from intarsia.ops.attention_call import AttentionCall
from intarsia.ops.choice import Implementation
from intarsia.ops.compiler import all_same
from intarsia.ops.compressed_call import CompressedCall
from intarsia.ops.keys import Keys, Paged, entry_of, row_of
from intarsia.ops.native_operator import implementation
from intarsia.ops.sequences import Sequences


@dataclass(frozen=True)
class Fold:
    """How the last queries of a sequence become queries with more heads."""

    size: int
    """So many tokens are one query."""
    lead: int
    """Tokens that are missing at the first query's front."""
    blind: int
    """The first queries that see no key."""
    count: int
    """The queries behind them."""

    @classmethod
    def of(cls, stride: int, width: int, new: int, tokens: int, size: int) -> Fold:
        """Of `new` queries, the last of so many `tokens`, of which one is alone or `stride` are one."""
        wide = width // stride
        if not new:
            return cls(size, 0, 0, 0)
        # The number of keys that the first and the last query see, those that are none among them.
        first, last = (tokens - new + 1) // stride, tokens // stride
        blind = min(max(wide - first, 0), last - first + 1)
        lead = 0 if size == 1 else (tokens - new + 1) % stride
        return cls(size, lead, blind, last - first + 1 - blind)

    def folded(self, q: Tensor, heads: int) -> Tensor:
        """`[B, count, size H, K]` of queries `[B, T, H, K]`; `heads` are those of the keys."""
        room = (self.blind + self.count) * self.size - self.lead - q.shape[1]
        rows = F.pad(q, (0, 0, 0, 0, self.lead, room)).unflatten(1, (self.blind + self.count, self.size))[
            :, self.blind :
        ]
        return rows.unflatten(3, (heads, -1)).transpose(2, 3).flatten(2, 4)

    def unfolded(self, o: Tensor, heads: int, new: int) -> Tensor:
        """`[B, T, H, V]` of outputs `[B, count, size H, V]`, T being `new`."""
        rows = o.unflatten(2, (heads, self.size, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return F.pad(rows, (0, 0, 0, 0, self.blind * self.size, 0))[:, self.lead : self.lead + new]


def _folded(call: CompressedCall, pages: bool, attend: Callable[[AttentionCall], Tensor]) -> Tensor:
    """`[B, T, H, V]` by softmax attention; `pages`: whether it takes pages of which the first entries are not read."""
    q, skipped = call.q, call.width // call.stride - 1
    B, T, H = q.shape[:3]
    heads, channels = entry_of(call.k).shape[2], entry_of(call.v).shape[3]
    new = (T,) * B if call.seqs is None else call.seqs.lengths
    size = 1 if max(new) == 1 else call.stride
    folds = [
        Fold.of(call.stride, call.width, each, seen, size)
        for each, seen in zip(new, call.tokens, strict=True)
    ]
    if isinstance(call.k, Tensor) and isinstance(call.v, Tensor) and call.seqs is None and all_same(folds):
        fold = folds[0]
        if not fold.count:
            return q.new_zeros(B, T, H, channels)
        k, v = (x[:, skipped:] for x in (call.k, call.v))
        o = attend(AttentionCall(fold.folded(q, heads), k, v, call.scale, None, None, None, None))
        return fold.unfolded(o, heads, T)
    parts = q.split(1) if call.seqs is None else q.split(new, dim=1)
    counts = tuple(fold.count for fold in folds)
    if not any(counts):
        return q.new_zeros(B, T, H, channels)
    keys, values = (_without_first(x, skipped, call.seqs, pages) for x in (call.k, call.v))
    rows = torch.cat([fold.folded(part, heads) for fold, part in zip(folds, parts, strict=True)], dim=1)
    o = attend(AttentionCall(rows, keys, values, call.scale, None, None, None, Sequences(counts)))
    found = [
        fold.unfolded(each, heads, length)
        for fold, each, length in zip(folds, o.split(counts, dim=1), new, strict=True)
    ]
    return torch.cat(found, dim=0 if call.seqs is None else 1)


def _without_first(keys: Keys, skipped: int, seqs: Sequences | None, pages: bool) -> Keys:
    """The keys of each sequence without those that are none."""
    if isinstance(keys, Paged) and pages:
        return Paged(keys.pages, keys.table.held_from(skipped))
    if isinstance(keys, Tensor) and seqs is not None:
        return tuple(x[:, skipped:] for x in keys.split(seqs.lengths, dim=1))
    if isinstance(keys, Tensor):
        return tuple(x[:, skipped:] for x in keys.split(1))
    count = len(keys) if isinstance(keys, tuple) else len(keys.table.lengths)
    return tuple(row_of(keys, n)[:, skipped:] for n in range(count))


def _refuse(call: CompressedCall) -> str | None:
    return attention_cpu.IMPLEMENTATION.refuse(_unfolded_call(call))


def _yields(call: CompressedCall) -> str | None:
    if call.q.shape[1] <= attention_cpu.FEW * call.stride or call.seqs is not None:
        return None
    if isinstance(call.k, Tensor) and set(call.tokens) == {call.q.shape[1]}:
        return "PyTorch's fused kernels are faster for whole sequences"
    return None


def _unfolded_call(call: CompressedCall) -> AttentionCall:
    """What is asked of softmax attention, as far as it decides whether it serves."""
    return AttentionCall(call.q, call.k, call.v, call.scale, None, None, None, call.seqs)


def compressed_torch(call: CompressedCall) -> Tensor:
    """`[B, T, H, V]` in the dtype of q, by PyTorch's softmax attention."""
    return _folded(call, False, attention_torch.attention_torch)


def compressed_cpu(call: CompressedCall) -> Tensor:
    """The same by the native kernels."""
    return _folded(call, True, attention_cpu.attention_cpu)


IN_TORCH = Implementation("torch", compressed_torch)
NATIVE = replace(implementation(compressed_cpu, _refuse), yields=_yields)
