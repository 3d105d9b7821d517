"""Calls of the softmax over logits, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from intarsia.errors import ShapeError


class LogSumCall(NamedTuple):
    """A checked call of `log_sum_exp`: `logits` `[N, V]`."""

    logits: Tensor


class SoftmaxCall(NamedTuple):
    """A checked call of `softmax_gradient`: `logits` `[N, V]`, the rest `[N]`."""

    logits: Tensor
    log_sum: Tensor
    targets: Tensor
    gradient: Tensor


def log_sum_call(logits: Tensor) -> LogSumCall:
    """Check a call of `log_sum_exp`.

    Raises:
        ShapeError: logits that are no matrix of floating-point numbers.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ShapeError(f"logits must be [N, V], floating-point; got {list(logits.shape)} {logits.dtype}")
    return LogSumCall(logits)


def softmax_call(logits: Tensor, log_sum: Tensor, targets: Tensor, gradient: Tensor) -> SoftmaxCall:
    """Check a call of `softmax_gradient`.

    Raises:
        ShapeError: arguments that do not fit together.
    """
    log_sum_call(logits)
    rows = logits.shape[:1]
    if any(x.shape != rows for x in (log_sum, targets, gradient)) or targets.dtype != torch.int64:
        raise ShapeError(
            f"log_sum, targets (int64) and gradient must have a number for each row of logits {list(logits.shape)}; "
            f"got {list(log_sum.shape)}, {list(targets.shape)} {targets.dtype}, {list(gradient.shape)}"
        )
    return SoftmaxCall(logits, log_sum, targets, gradient)
