"""Cross-entropy that never holds the logits of many tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from intarsia.errors import ShapeError
from intarsia.layers.narrow import NarrowWeight
from intarsia.ops import log_sum_exp, softmax_gradient
from intarsia.ops.compiler import is_static
from intarsia.ops.precision import product_dtype, without_autocast
from intarsia.ops.tracing import differentiable_once, transform

IGNORED = -100
"""The target of a token that has none."""

BLOCK = 2**22
"""Logits of a block."""
COLUMNS = 4096
"""Of a block, at least, where the vocabulary has as many: a product with fewer is slower, and so is adding up the
weight's gradient over blocks of fewer tokens."""
KEPT_BYTES = 2**26
"""Logits that take no more are kept for the backward pass; of more it computes them again."""


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORED,
    chunk_size: int | None = None,
    narrow: NarrowWeight | None = None,
) -> Tensor:
    """Negative log-likelihood of each target under `softmax(hidden @ weight.T)`, in nats.

    Blocks of logits exist one at a time, about four million numbers in the dtype of the products, and each again in
    the backward pass: computed a second time, unless all of them take 64 MiB at most, which are kept. Log-softmax and
    sums over blocks are float32 (float64 for float64 inputs); the products run in the autocast dtype, if autocast is
    on.

    Args:
        hidden: `[..., D]`, any floating dtype.
        weight: `[V, D]`.
        targets: `[...]` int64; `ignore_index` where there is none.
        chunk_size: tokens of a block; by default 1024, and more where the vocabulary is small.
        narrow: of the weight. Its copy is read where that has the dtype of the products, and the weight's gradient is
            added to `weight.grad` itself then.

    Returns:
        `[...]` float32, 0 where the target is ignored. Any function of it can be differentiated, once.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"hidden [..., D], weight [V, D] and targets [...] do not fit: "
            f"{list(hidden.shape)}, {list(weight.shape)}, {list(targets.shape)}"
        )
    if chunk_size is None:
        chunk_size = BLOCK // min(weight.shape[0], COLUMNS)
    arguments = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        ignore_index,
        chunk_size,
        product_dtype(weight),
    )
    if transform() is not None:
        nll, _ = _likelihoods(*arguments)
    elif torch.compiler.is_compiling() and not is_static(arguments[0].shape[0]):
        # A loop of as many rounds as the tokens make would be another graph for each number of tokens.
        nll, _ = torch.ops.intarsia.cross_entropy(*arguments)
    else:
        differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        narrow = None if narrow is None or narrow.copy.dtype != arguments[-1] else narrow
        nll = _ChunkedCrossEntropy.apply(*arguments, differentiated, narrow)
    return nll.view(targets.shape)


@torch.no_grad()
def cross_entropy_of(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same, without gradients, under a head that is more than a matrix: one with packed weights.

    Args:
        head: `[N, D]` to logits `[N, V]`; it is given some tokens at a time, at least 128.
    """
    ignored, rows = targets.flatten() == IGNORED, hidden.flatten(0, -2)
    wanted = targets.flatten().masked_fill(ignored, 0)
    found = [
        F.cross_entropy(head(rows[part]).float(), wanted[part], reduction="none")
        for part in _parts(rows.shape[0], max(128, BLOCK // head.out_features))
    ]
    return torch.cat(found).masked_fill(ignored, 0).view(targets.shape)


class _ChunkedCrossEntropy(torch.autograd.Function):
    # The backward pass may run outside or inside of the caller's autocast: both passes turn it off and cast
    # by themselves.

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        chunk_size: int,
        dtype: torch.dtype,
        differentiated: bool,
        narrow: NarrowWeight | None,
    ) -> Tensor:
        few = targets.numel() * weight.shape[0] * dtype.itemsize <= KEPT_BYTES
        kept: list[Tensor] | None = [] if differentiated and few else None
        with without_autocast(hidden):
            # Both passes read them.
            factors = hidden.to(dtype), weight.to(dtype) if narrow is None else narrow.copy
        nll, log_sum = _likelihoods(*factors, targets, ignore_index, chunk_size, dtype, kept)
        ctx.save_for_backward(*factors, targets, log_sum, *(kept or ()))
        ctx.options = ignore_index, chunk_size, dtype
        ctx.narrow = narrow
        ctx.dtypes = hidden.dtype, weight.dtype
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sum, *kept = ctx.saved_tensors
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        d_hidden = hidden.new_zeros(hidden.shape, dtype=log_sum.dtype) if of_hidden else None
        d_weight, new = None, True
        if of_weight and ctx.narrow is not None:
            d_weight, new = ctx.narrow.gradient()
        elif of_weight:
            d_weight = weight.new_empty(weight.shape, dtype=log_sum.dtype)
        _add_gradients(
            d_hidden, d_weight, hidden, weight, targets, log_sum, gradient, *ctx.options, kept=kept, new=new
        )
        found = d_hidden, None if ctx.narrow is not None else d_weight
        gradients = [None if x is None else x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True)]
        return *gradients, None, None, None, None, None, None


def _likelihoods(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk_size: int,
    dtype: torch.dtype,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of each of N tokens and the logarithm of the sum of its exponentials, `[N]`. The blocks of logits are
    added to `kept`."""
    ignored = targets == ignore_index
    targets = targets.masked_fill(ignored, 0)
    # What no block would notice: a target that is not in the vocabulary is refused here, on any device.
    weight[:, 0].detach().index_select(0, targets)
    likelihoods, log_sums = [], []
    with without_autocast(hidden):
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        for rows in _parts(hidden.shape[0], chunk_size):
            sums, chosen = [], []
            for columns in _parts(weight.shape[0], _columns(chunk_size)):
                logits = hidden[rows] @ weight[columns].T
                if kept is not None:
                    kept.append(logits)
                sums.append(log_sum_exp(logits))
                chosen.append(_at(logits, targets[rows] - columns.start))
            log_sums.append(functools.reduce(torch.logaddexp, sums))
            likelihoods.append(log_sums[-1] - functools.reduce(torch.add, chosen))
    return torch.cat(likelihoods).masked_fill(ignored, 0), torch.cat(log_sums)


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    gradient: Tensor,
    ignore_index: int,
    chunk_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients of `hidden` and `weight`."""
    with without_autocast(hidden):
        narrow = hidden.to(dtype), weight.to(dtype)
    d_hidden, d_weight = (x.new_zeros(x.shape, dtype=log_sum.dtype) for x in narrow)
    _add_gradients(
        d_hidden, d_weight, *narrow, targets, log_sum, gradient, ignore_index, chunk_size, dtype, kept=[]
    )
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype)


def _add_gradients(
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    gradient: Tensor,
    ignore_index: int,
    chunk_size: int,
    dtype: torch.dtype,
    *,
    kept: list[Tensor],
    new: bool = False,
) -> None:
    """Add the gradients of `hidden` and `weight`, which are in `dtype`, to those that are given. `kept` are the blocks
    of logits, if they were; `new` says that `d_weight` holds no numbers yet."""
    ignored = targets == ignore_index
    gradient = gradient.masked_fill(ignored, 0)
    blocks = iter(kept)
    with without_autocast(hidden):
        for rows in _parts(hidden.shape[0], chunk_size):
            for columns in _parts(weight.shape[0], _columns(chunk_size)):
                logits = next(blocks) if kept else hidden[rows] @ weight[columns].T
                d_logits = softmax_gradient(
                    logits, log_sum[rows], targets[rows] - columns.start, gradient[rows]
                )
                if d_hidden is not None:
                    d_hidden[rows] += d_logits @ weight[columns]
                if d_weight is not None:
                    part = d_logits.T @ hidden[rows]
                    if new and not rows.start:
                        d_weight[columns] = part
                    else:
                        d_weight[columns] += part


_library = torch.library.Library("intarsia", "FRAGMENT")
_OPTIONS = "int ignore_index, SymInt chunk_size, ScalarType dtype"
_library.define(
    f"cross_entropy(Tensor hidden, Tensor weight, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor)"
)
_library.define(
    "cross_entropy_backward(Tensor hidden, Tensor weight, Tensor targets, Tensor log_sum, Tensor gradient,"
    f" {_OPTIONS}) -> (Tensor, Tensor)"
)
torch.library.impl(_library, "cross_entropy", "CompositeExplicitAutograd")(_likelihoods)
torch.library.impl(_library, "cross_entropy_backward", "CompositeExplicitAutograd")(_gradients)


@torch.library.register_fake("intarsia::cross_entropy", lib=_library)
def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    result = hidden.new_empty(targets.shape, dtype=torch.promote_types(dtype, torch.float32))
    return result, torch.empty_like(result)


@torch.library.register_fake("intarsia::cross_entropy_backward", lib=_library)
def _fake_backward(hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.intarsia.cross_entropy_backward(*ctx.saved_tensors, gradient, *ctx.options)
    return *gradients, None, None, None, None


torch.library.register_autograd(
    "intarsia::cross_entropy", _differentiate, setup_context=_setup_context, lib=_library
)
differentiable_once(_library, "intarsia::cross_entropy_backward", "the cross-entropy")


def _parts(size: int, each: int) -> list[slice]:
    """Of all; one where there is none."""
    return [slice(start, min(start + each, size)) for start in range(0, max(size, 1), each)]


def _columns(chunk_size: int) -> int:
    """Of a block with so many tokens."""
    return max(1, BLOCK // chunk_size)


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    """The logit of each row's target, `[N]` float32 (float64 for float64), 0 where it is in no column."""
    last = logits.shape[1] - 1
    chosen = logits.gather(1, targets.clamp(0, last)[:, None]).squeeze(1)
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    return chosen.masked_fill((targets < 0) | (targets > last), 0)
