"""The chunkwise form for every caller: PyTorch's operations, or one operator where torch.compile knows no lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.chunked import chunked
from intarsia.ops.linear_call import LinearCall, linear_call
from intarsia.ops.precision import compute_dtype
from intarsia.ops.sequences import Sequences
from intarsia.ops.tracing import fakes_beside, sizes
from intarsia.ops.uncompiled import Uncompiled


def chunked_anywhere(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """`chunked`, of which torch.compile makes one graph for all lengths that are not constants."""
    call = call.plain()
    if not torch.compiler.is_compiling():
        with fakes_beside(call.q):
            return chunked(call)
    tensors = (call.q, call.k, call.v, call.g, call.beta, call.a, call.b, call.initial_state)
    # A batch has one length, and no packing.
    lengths = (sizes(call.q)[1],) if call.seqs is None else call.seqs.lengths
    # A packing is of no use as a constant: the next one is another.
    packed = call.seqs is not None
    o, final = _CHUNKED(tensors, lengths, (call.scale, packed), always=packed)
    return o, final if call.output_final_state else None


def _run(
    tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]
) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta, a, b, initial_state = tensors
    scale, packed = numbers
    assert q is not None
    assert k is not None
    assert v is not None
    o, final = chunked(
        linear_call(
            q, k, v, g, beta, a, b, scale=scale, initial_state=initial_state, output_final_state=True,
            cu_seqlens=Sequences(tuple(lengths)) if packed else None,
        )
    )  # fmt: skip
    assert final is not None
    return o, final


def _outputs(
    tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]
) -> list[Tensor]:
    q, k, v, *_ = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    count = len(lengths) if numbers[1] else q.shape[0]
    state = (count, v.shape[2], k.shape[3], v.shape[3])
    return [v.new_empty(v.shape), q.new_empty(state, dtype=compute_dtype(q, k, v))]


_CHUNKED = Uncompiled("chunked", 8, 2, _run, _outputs)

IMPLEMENTATION = Implementation("chunked", chunked_anywhere)
