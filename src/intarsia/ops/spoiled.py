"""The outputs of the chunkwise form without what later tokens of a chunk make infinite or NaN.

The rare case of `finite.spoiled`, computed at leisure: once with zeros in the place of inputs that are not finite, and
where finite inputs overflow, a search for the token at which they do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intarsia.ops.finite import since, spoiled
from intarsia.ops.linear_call import LinearCall
from intarsia.ops.precision import widen

Compute = Callable[[LinearCall], Tensor]


def without_later(call: LinearCall, o: Tensor, compute: Compute) -> Tensor:
    """`o`, of which some numbers are not finite, with those that later tokens made so computed anew, as any finite
    future leaves them. `compute` gives the outputs of a call."""
    clean, lost = _without_infinities(call)
    before = compute(clean)
    if spoiled(before):
        overflow = _first_overflow(clean, compute)
        before = compute(_only_before(clean, overflow))
        lost = lost | ~_heads(_before(clean, overflow), call.v.shape[2])[..., None]
    return o.where(lost, before)


def _without_infinities(call: LinearCall) -> tuple[LinearCall, Tensor]:
    """The call with zeros in the place of numbers that are not finite, and the outputs that these reach,
    `[B, T, HV, V]` bool: from k, beta, g, a and b all later ones of a head, from v those of its channel, from q its
    own token's."""
    HV = call.v.shape[2]
    bad = {name: ~x.isfinite() for name, x in _by_key(call).items() if x is not None}
    bad["v"] = ~call.v.isfinite()
    if call.beta is not None:
        bad["beta"] = ~call.beta.isfinite()
    if call.g is not None and call.decay != "fixed":
        bad["g"] = ~widen(call.g).exp().isfinite()  # -inf is a log-decay like any other
    reach = bad["v"]
    for name in ("k", "a", "b", "beta", "g"):
        if name in bad:
            numbers = bad[name]
            reach = reach | _heads(numbers if numbers.dim() == 3 else numbers.any(-1), HV)[..., None]
    own = _heads(bad["q"].any(-1), HV)[..., None]
    zeroed: dict[str, Any] = {name: getattr(call, name).masked_fill(x, 0) for name, x in bad.items()}
    return replace(call, **zeroed), since(reach, call.seqs) | own


def _first_overflow(call: LinearCall, compute: Compute) -> Tensor:
    """Of each sequence and query head the first token with which the outputs are not all finite, `[N, H]`, found by
    halving; the length of the longest sequence where there is none."""
    N, H = call.sequences, call.q.shape[2]
    longest = call.q.shape[1] if call.seqs is None else call.seqs.max_length
    below = torch.zeros(N, H, dtype=torch.long)
    above = torch.full((N, H), longest + 1)
    with torch.no_grad():
        while bool((above - below > 1).any()):
            middle = (below + above) // 2
            bad = ~compute(_only_before(call, middle)).isfinite()
            bad = bad.any(-1).unflatten(2, (H, -1)).any(-1)
            if call.seqs is None:
                overflows = bad.any(1)
            else:
                index = call.seqs.indices()
                overflows = torch.zeros(N, H, dtype=torch.long).index_add(0, index, bad[0].long()) > 0
            below, above = below.where(overflows, middle), middle.where(overflows, above)
    return below


def _before(call: LinearCall, end: Tensor) -> Tensor:
    """Which tokens of each query head come before `end` `[N, H]` of their sequence, `[B, T, H]` bool."""
    if call.seqs is None:
        return torch.arange(call.q.shape[1])[None, :, None] < end[:, None]
    return (call.seqs.positions()[:, None] < end[call.seqs.indices()])[None]


def _only_before(call: LinearCall, end: Tensor) -> LinearCall:
    """The call with zeros for all tokens from `end` on."""
    later = ~_before(call, end)
    zeroed: dict[str, Any] = {}
    for name, x in {**_by_key(call), "v": call.v, "beta": call.beta, "g": call.g}.items():
        if x is not None and x.dim() > 1:
            heads = _heads(later, x.shape[2])
            zeroed[name] = x.masked_fill(heads if x.dim() == 3 else heads[..., None], 0)
    return replace(call, **zeroed)


def _by_key(call: LinearCall) -> dict[str, Tensor | None]:
    """What has the keys' channels."""
    return {"q": call.q, "k": call.k, "a": call.a, "b": call.b}


def _heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, h]` for so many heads, which share h."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)
