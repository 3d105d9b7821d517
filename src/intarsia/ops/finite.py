"""What a token makes infinite, or NaN, is kept out of the outputs before it.

A product of matrices multiplies by 0 what a token may not see. That hides everything but infinity and NaN. So the forms
in PyTorch look at what came out, and where something is not finite they compute again with zeros in the place of the
tokens that made it so: what stands before them is then what any finite future leaves, to the bit. (The native kernels
do the same for the 16 tokens of a block.)

Looking takes one pass over the outputs. Nobody looks where that is not possible or costs more: on a GPU, where the host
would have to wait for it, and in programs that are traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.precision import widen
from intarsia.ops.sequences import Sequences
from intarsia.ops.tracing import observed


def spoiled(o: Tensor) -> bool:
    """Whether outputs that can be looked at are not all finite."""
    if o.device.type != "cpu" or type(o) is not Tensor or observed():
        return False
    o = o.detach()
    # A sum is the quickest look. It can overflow, and then each number is looked at.
    return not math.isfinite(o.sum().item()) and not bool(o.isfinite().all())


def since(bad: Tensor, seqs: Sequences | None) -> Tensor:
    """Whether this token or one before it in its sequence is bad; `[B, T, ...]` bool."""
    parts = bad.split(bad.shape[1] if seqs is None else seqs.occupied, dim=1)
    return torch.cat([part.int().cumsum(1) > 0 for part in parts], dim=1)


def attended(
    attend: Callable[..., Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    queries: Tensor,
    windows: Sequence[int | None] | None = None,
) -> Tensor:
    """`attend(*keys, *values)` without what later tokens make infinite or NaN.

    Args:
        attend: gives `[B, T, H, V]`, of T queries that are the last of S tokens.
        keys: each `[B, S, heads]` or `[B, S, heads, K]`, S or T tokens and H a multiple of heads; a number that is not
            finite spoils its head of all tokens that see it.
        values: each `[B, S, heads, V]`; such a number spoils its own channel.
        queries: `[B, T, H, K]`; a key whose product with an earlier one of them can overflow is taken for infinite.
        windows: how many tokens see each of the keys and values, its own among them; None: all.
    """
    o = attend(*keys, *values)
    T, H = o.shape[1:3]
    if T == 1 or not spoiled(o):
        return o
    largest = widen(queries.detach()).nan_to_num(0, 0, 0).abs().amax((2, 3)).cummax(1).values
    bad = [~(_four(k).abs().sum(-1, keepdim=True) * _earlier(largest, k)).isfinite() for k in keys]
    bad += [~_four(v).isfinite() for v in values]
    tensors = (*keys, *values)
    clean = attend(*(x.masked_fill(b.flatten(x.dim() - 1), 0) for x, b in zip(tensors, bad, strict=True)))
    seen = torch.zeros_like(o, dtype=torch.bool)
    for b, window in zip(bad, windows or [None] * len(bad), strict=True):
        seen |= _within(b, window)[:, -T:].repeat_interleave(H // b.shape[2], dim=2)
    return o.where(seen, clean)


def _earlier(largest: Tensor, keys: Tensor) -> Tensor:
    """For each key what stands one token before it in `largest` `[B, T]`, `[B, S, 1, 1]`; 0 where there is nothing."""
    T, S = largest.shape[1], keys.shape[1]
    return F.pad(largest[:, :-1], (S - T + 1, 0))[..., None, None]


def _four(x: Tensor) -> Tensor:
    """`[B, S, heads, ...]` in four dimensions, wide."""
    x = widen(x.detach())
    return x[..., None] if x.dim() == 3 else x


def _within(bad: Tensor, window: int | None) -> Tensor:
    """Whether one of the last `window` tokens is bad, `[B, S, ...]` bool."""
    count = bad.int().cumsum(1)
    if window is not None and window < bad.shape[1]:
        count = count - F.pad(count, (0, 0, 0, 0, window, 0))[:, : count.shape[1]]
    return count > 0
