"""The short convolution as it is defined, one token at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.conv_call import ConvCall
from intarsia.ops.precision import compute_dtype


def conv_reference(call: ConvCall) -> tuple[Tensor, Tensor | None]:
    """`y_t = sum_w weight[:, w] x_{t - W + 1 + w}`, each sequence behind its own last inputs."""
    x, weight = call.x.double(), call.weight.double()
    if call.initial_state is None:
        pasts = x.new_zeros(call.sequences, weight.shape[1] - 1, x.shape[2])
    else:
        pasts = call.initial_state.double()
    # A packed row is cut into its sequences; a batch is one group of sequences that run side by side.
    groups = [(x, pasts)]
    if call.seqs is not None:
        groups = list(zip(x.split(call.seqs.lengths, dim=1), pasts.split(1), strict=True))
    outputs, finals = [], []
    for tokens, window in groups:
        for x_t in tokens.unbind(1):
            window = torch.cat([window, x_t[:, None]], dim=1)
            y_t = (window * weight.mT).sum(1)
            outputs.append(y_t * torch.sigmoid(y_t) if call.silu else y_t)
            window = window[:, 1:]
        finals.append(window)
    y = torch.stack(outputs, dim=1).to(call.x.dtype) if outputs else call.x.new_empty(call.x.shape)
    return y, torch.cat(finals).to(compute_dtype(call.x)) if call.output_final_state else None


IMPLEMENTATION = Implementation("reference", conv_reference, automatic=False)
