"""The specification of attention to compressed keys: one query at a time, in float64, written to be read.

Key e is of the `width` tokens up to token `(e + 1) stride - 1`. So the query of token i sees those with

    width / stride - 1 <= e        and        (e + 1) stride - 1 <= i

and gets `softmax_e(q · k_e scale)` of their values, or zeros where there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.attention_call import queries_of
from intarsia.ops.choice import Implementation
from intarsia.ops.compressed_call import CompressedCall
from intarsia.ops.keys import Keys, row_of


def compressed_reference(call: CompressedCall) -> Tensor:
    """`[B, T, H, V]` in the dtype of q."""
    outputs = []
    for n, q in queries_of(call.q, call.seqs):
        k, v = (_of_sequence(x, call, n).double() for x in (call.k, call.v))
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[1], dim=1) for x in (k, v))
        T, rows = q.shape[1], []
        for t in range(T):
            i = call.tokens[n] - T + t
            seen = [e for e in range(call.width // call.stride - 1, len(k)) if (e + 1) * call.stride - 1 <= i]
            logits = torch.einsum("hk,ehk->he", q[0, t].double(), k[seen]) * call.scale
            rows.append(torch.einsum("he,ehv->hv", logits.softmax(dim=1), v[seen]))
        outputs.append(torch.stack(rows))
    o = torch.stack(outputs) if call.seqs is None else torch.cat(outputs)[None]
    return o.to(call.q.dtype)


def _of_sequence(keys: Keys, call: CompressedCall, n: int) -> Tensor:
    """The entries `[S, ...]` of sequence n."""
    if isinstance(keys, Tensor) and call.seqs is not None:
        return keys[0, call.seqs.starts[n] :][: call.seqs.lengths[n]]
    return row_of(keys, n)[0]


IMPLEMENTATION = Implementation("reference", compressed_reference, automatic=False)
