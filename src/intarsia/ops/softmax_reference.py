"""The softmax over logits as it is defined, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.precision import compute_dtype
from intarsia.ops.softmax_call import LogSumCall, SoftmaxCall


def log_sum_reference(call: LogSumCall) -> Tensor:
    """`ln(sum(exp(logits)))`, rounded once."""
    wide = call.logits.double()
    largest = wide.amax(1, keepdim=True)
    return ((wide - largest).exp().sum(1).log() + largest[:, 0]).to(compute_dtype(call.logits))


def gradient_reference(call: SoftmaxCall) -> Tensor:
    """`(exp(logits - log_sum) - [column == target]) * gradient`, rounded once."""
    likelihood = (call.logits.double() - call.log_sum.double()[:, None]).exp()
    columns = torch.arange(call.logits.shape[1], device=call.logits.device)
    at_target = (columns == call.targets[:, None]).double()
    return ((likelihood - at_target) * call.gradient.double()[:, None]).to(call.logits.dtype)


LOG_SUM = Implementation("reference", log_sum_reference, automatic=False)
GRADIENT = Implementation("reference", gradient_reference, automatic=False)
