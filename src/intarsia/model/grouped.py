"""A linear map whose weight depends on the row: what a mixture of experts computes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("intarsia::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x[i] @ weight[e].T` where row `i` belongs to group `e`: `[N, D]` and `[E, F, D]` to `[N, F]`.

    The rows are sorted by group; `ends` `[E]` int64 is the row after the last of each group. One call of
    `torch.nn.functional.grouped_mm` where that can serve, else a loop over the groups. It is an operator of
    its own because `grouped_mm` refuses most dtypes when it is traced, and some gradients.
    """
    if _grouped_mm_serves(x, weight):
        return F.grouped_mm(x, weight.mT, offs=ends.to(torch.int32))
    y = x.new_empty(x.shape[0], weight.shape[1])
    for e, rows in enumerate(_groups(ends)):
        if rows.stop > rows.start:
            torch.mm(x[rows], weight[e].T, out=y[rows])
    return y


@torch.library.custom_op("intarsia::grouped_outer", mutates_args=())
def grouped_outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The sums of outer products `y[i] x[i]ᵀ` over each group: `[N, F]` and `[N, D]` to `[E, F, D]`."""
    if _grouped_mm_serves(x, y):
        return F.grouped_mm(y.mT, x, offs=ends.to(torch.int32))
    weight = x.new_zeros(ends.shape[0], y.shape[1], x.shape[1])
    for e, rows in enumerate(_groups(ends)):
        if rows.stop > rows.start:
            torch.mm(y[rows].T, x[rows], out=weight[e])
    return weight


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], y.shape[1], x.shape[1])


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    grad_x = grouped_linear(gradient, weight.mT, ends) if ctx.needs_input_grad[0] else None
    grad_weight = grouped_outer(gradient, x, ends) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


grouped_linear.register_autograd(_linear_backward, setup_context=_keep_inputs)


@register_flop_formula([torch.ops.intarsia.grouped_linear, torch.ops.intarsia.grouped_outer])
def _flops(left: Any, right: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    # Both multiply each of N rows with one matrix of D x F: D or F is the rows' width.
    rows, width = left
    return int(2 * rows * width * (out_shape[-1]))


def _groups(ends: Tensor) -> list[slice]:
    edges = [0, *ends.tolist()]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _grouped_mm_serves(x: Tensor, other: Tensor) -> bool:
    # It wants rows of whole 16 bytes. On graphics cards it is written for bfloat16 and compute capability 8.
    if not hasattr(F, "grouped_mm") or x.shape[0] == 0:
        return False
    aligned = all(size * x.element_size() % 16 == 0 for size in (x.shape[-1], *other.shape[1:]))
    if x.is_cuda:
        modern = torch.cuda.get_device_capability(x.device) >= (8, 0)
        return aligned and modern and x.dtype == torch.bfloat16
    return aligned and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
