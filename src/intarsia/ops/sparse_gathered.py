"""Sparse attention of whole sequences with gradients, by the native kernels of `csrc/gathered*`.

Each query reads what it picked where that lies, in the forward pass and again in the backward pass: nothing is copied
together, and what is kept between the two is a number of each query and head. All is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from intarsia.ops import native
from intarsia.ops.attention_call import AttentionCall
from intarsia.ops.native_operator import detached, edges_of, register, rows
from intarsia.ops.sequences import Sequences as Packed
from intarsia.ops.sparse_call import SparseCall
from intarsia.ops.sparse_torch import sparse_torch

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor picked"


def gathered(
    q: Tensor, k: Tensor, v: Tensor, picked: Tensor, lengths: Sequence[int], block: int, scale: float
) -> Tensor:
    """`[B, T, H, V]` of whole sequences: `B` of them, or of the `lengths` that are packed into one row."""
    B, T = q.shape[:2]
    each = [T] * B if B > 1 or len(lengths) == 1 else list(lengths)
    flat = (rows(x.flatten(0, 1)) for x in (q, k, v))
    chosen = picked.flatten(0, 1).to(torch.int32).contiguous()
    o: Tensor = _gathered(*flat, chosen, each, block, scale)[0]
    return o.unflatten(0, (B, T))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, picked: Tensor, lengths: list[int], block: int, scale: float
) -> tuple[Tensor, Tensor]:
    o, log_sum = _room(q, k, v)
    native.native().gathered_forward(
        *detached([q, k, v, picked]), edges_of(lengths), block, scale, o, log_sum, native.instruction_set(),
        torch.get_num_threads(),
    )  # fmt: skip
    return o, log_sum


def _room(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    o = q.new_empty(*q.shape[:2], v.shape[2])
    return o, q.new_empty(q.shape[:2], dtype=torch.float32)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, picked: Tensor, lengths: list[int], block: int, scale: float, log_sum: Tensor,
    d_o: Tensor,
) -> list[Tensor]:  # fmt: skip
    d_q, d_k, d_v, d_picked = _gradients(q, k, v, picked)
    native.native().gathered_backward(
        *detached([q, k, v, picked]), edges_of(lengths), block, scale, rows(d_o), log_sum, d_q, d_k, d_v,
        native.instruction_set(), torch.get_num_threads(),
    )  # fmt: skip
    return [d_q, d_k, d_v, d_picked]


def _gradients(q: Tensor, k: Tensor, v: Tensor, picked: Tensor, *_: Any) -> list[Tensor]:
    return [*(x.new_empty(x.shape) for x in (q, k, v)), picked.new_empty(0)]


def _again(
    q: Tensor, k: Tensor, v: Tensor, picked: Tensor, lengths: list[int], block: int, scale: float
) -> tuple[Tensor]:
    dense = AttentionCall(q[None], k[None], v[None], scale, None, None, None, Packed(tuple(lengths)))
    return (sparse_torch(SparseCall(dense, picked[None], block))[0],)


_gathered = register(
    "gathered",
    "sparse_attention",
    tensors=_TENSORS,
    settings="int[] lengths, int block, float scale",
    results="Tensor o",
    kept="Tensor log_sum",
    run=_forward,
    fake=_room,
    run_backward=_backward,
    fake_backward=_gradients,
    again=_again,
)
