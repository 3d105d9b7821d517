"""The specification of softmax attention: one query at a time, in float64, written to be read.

    o_i = sum_j w_ij v_j      w_ij = exp(l_ij) / (exp(sink) + sum_j exp(l_ij))      l_ij = q_i k_jᵀ scale + c_i - c_j

over the tokens j that token i sees: `i - window < j <= i`. Without sinks `exp(sink)` is 0, without a forget gate c is.
Every other implementation is tested against this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.ops.attention_call import AttentionCall, LatentCall, queries_of
from intarsia.ops.choice import Implementation
from intarsia.ops.keys import Keys, row_of


def attention_reference(call: AttentionCall) -> Tensor:
    """`[B, T, H, V]` in the dtype of q."""
    outputs = []
    for n, q in queries_of(call.q, call.seqs):
        k, v = (_of_sequence(call, x, n).double() for x in (call.k, call.v))
        c = None if call.log_gate is None else _of_sequence(call, call.log_gate, n).double()
        outputs.append(_of_queries(q[0].double(), k, v, c, call))
    o = torch.stack(outputs) if call.seqs is None else torch.cat(outputs)[None]
    return o.to(call.q.dtype)


def latent_reference(call: LatentCall) -> Tensor:
    """The same with the keys and values that the latents stand for: `[B, T, H, V]` in the dtype of q."""
    outputs = []
    for n, q in queries_of(call.q, call.seqs):
        latent, shared = (
            _of_sequence(call, call.latents, n)
            .double()
            .split_with_sizes([call.rank, call.q.shape[3] - call.own], dim=-1)
        )
        k_own, v = torch.einsum("sr,hcr->shc", latent, call.up.double()).split_with_sizes(
            [call.own, call.up.shape[1] - call.own], dim=-1
        )
        k = torch.cat([k_own, shared[:, None].expand(-1, call.q.shape[2], -1)], dim=-1)
        outputs.append(_of_queries(q[0].double(), k, v, None, _Plain(call.scale)))
    o = torch.stack(outputs) if call.seqs is None else torch.cat(outputs)[None]
    return o.to(call.q.dtype)


@dataclass(frozen=True)
class _Plain:
    """Attention without window and sinks."""

    scale: float
    window: int | None = None
    sinks: Tensor | None = None


def _of_sequence(call: AttentionCall | LatentCall, keys: Keys, n: int) -> Tensor:
    """The entries `[S, ...]` of sequence n."""
    if isinstance(keys, Tensor) and call.seqs is not None:
        return keys[0, call.seqs.starts[n] :][: call.seqs.lengths[n]]
    return row_of(keys, n)[0]


def _of_queries(q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, call: AttentionCall | _Plain) -> Tensor:
    """`[T, H, V]` of queries `[T, H, K]`, the last of the tokens that k `[S, HKV, K]` and v are of."""
    T, S, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    outputs = []
    for t in range(T):
        i = S - T + t
        seen = slice(0 if call.window is None else max(i - call.window + 1, 0), i + 1)
        logits = torch.einsum("hk,shk->sh", q[t], k[seen]) * call.scale
        if c is not None:
            logits = logits + c[i] - c[seen]
        # The largest logit is taken off all of them, which changes no weight and keeps exp from overflowing.
        largest = logits.amax(0) if call.sinks is None else logits.amax(0).maximum(call.sinks.double())
        weights = (logits - largest).exp()
        total = weights.sum(0)
        if call.sinks is not None:
            total = total + (call.sinks.double() - largest).exp()
        outputs.append(torch.einsum("sh,shv->hv", weights / total, v[seen]))
    return torch.stack(outputs)


IMPLEMENTATION = Implementation("reference", attention_reference, automatic=False)
OF_LATENTS = Implementation("reference", latent_reference, automatic=False)
