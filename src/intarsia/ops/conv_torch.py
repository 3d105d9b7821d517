"""The short convolution in plain PyTorch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.conv_call import ConvCall
from intarsia.ops.precision import compute_dtype


def conv_in_torch(call: ConvCall) -> tuple[Tensor, Tensor | None]:
    """The results of `short_convolution`.

    Each sequence is laid behind its own past, and all are convolved as one row: nothing reaches from one into the
    next but outputs at places of the past, which are cut out.
    """
    x, weight, silu, initial_state, output_final_state, seqs = call
    past = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(call.sequences, past, x.shape[2])
    pasts = initial_state.to(x.dtype)
    if seqs is None:
        row = torch.cat([pasts, x], dim=1)
        final = row[:, x.shape[1] :]
        y = _convolve(row, weight.to(x.dtype))
    else:
        parts = [
            part for pair in zip(pasts.split(1), x.split(seqs.lengths, dim=1), strict=True) for part in pair
        ]
        row = torch.cat(parts, dim=1)
        pieces = row.split([past + length for length in seqs.lengths], dim=1)
        final = (
            torch.cat([piece[:, piece.shape[1] - past :] for piece in pieces]) if output_final_state else row
        )
        between = [n for length in seqs.lengths for n in (length, past)][:-1]
        y = torch.cat(_convolve(row, weight.to(x.dtype)).split(between, dim=1)[::2], dim=1)
    return F.silu(y) if silu else y, final.to(compute_dtype(x)) if output_final_state else None


def _convolve(row: Tensor, weight: Tensor) -> Tensor:
    """The convolution of `[B, past + T, D]`, without padding: `[B, T, D]`."""
    W = weight.shape[1]
    T = row.shape[1] - W + 1
    y = row[:, W - 1 :] * weight[:, W - 1]
    for w in range(W - 1):
        y = torch.addcmul(y, row[:, w : w + T], weight[:, w])
    return y


IMPLEMENTATION = Implementation("torch", conv_in_torch, rounding="every product and sum to the dtype of x")
