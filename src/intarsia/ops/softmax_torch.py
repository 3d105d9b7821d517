"""The softmax over logits in plain PyTorch, on any device."""

from __future__ import annotations

from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.precision import compute_dtype, widen
from intarsia.ops.softmax_call import LogSumCall, SoftmaxCall


def log_sum_in_torch(call: LogSumCall) -> Tensor:
    """What `log_sum_exp` gives."""
    return widen(call.logits).logsumexp(1)


def gradient_in_torch(call: SoftmaxCall) -> Tensor:
    """What `softmax_gradient` gives."""
    logits, log_sum, targets, gradient = call
    dtype, V = compute_dtype(logits), logits.shape[1]
    here = ((targets >= 0) & (targets < V)).to(dtype)
    y = (logits.to(dtype) - log_sum.to(dtype)[:, None]).exp()
    y = y.scatter_add(1, targets.clamp(0, V - 1)[:, None], -here[:, None])
    return (y * gradient.to(dtype)[:, None]).to(logits.dtype)


LOG_SUM = Implementation("torch", log_sum_in_torch)
GRADIENT = Implementation("torch", gradient_in_torch)
