"""Cross-entropy that never holds the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from intarsia.errors import ShapeError
from intarsia.ops.compiler import is_static
from intarsia.ops.precision import product_dtype, without_autocast
from intarsia.ops.tracing import differentiable_once, transform

IGNORED = -100
"""The target of a token that has none."""


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORED,
    chunk_size: int | None = None,
) -> Tensor:
    """Negative log-likelihood of each target under `softmax(hidden @ weight.T)`, in nats.

    The logits of `chunk_size` tokens exist at a time, in the forward pass and again in the backward pass,
    which computes them a second time. Log-softmax, its gradient and the sum of the weight's gradient are
    float32 (float64 for float64 inputs); the products run in the autocast dtype, if autocast is on.

    Args:
        hidden: `[..., D]`, any floating dtype.
        weight: `[V, D]`.
        targets: `[...]` int64; `ignore_index` where there is none.
        chunk_size: tokens per chunk; by default such that a chunk holds about four million logits, and at
            least 128 tokens.

    Returns:
        `[...]` float32, 0 where the target is ignored. Any function of it can be differentiated, once.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"hidden [..., D], weight [V, D] and targets [...] do not fit: "
            f"{list(hidden.shape)}, {list(weight.shape)}, {list(targets.shape)}"
        )
    chunk_size = chunk_size or tokens_at_once(weight.shape[0])
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
        nll = _ChunkedCrossEntropy.apply(*arguments)
    return nll.view(targets.shape)


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens have about four million logits together; at least 128."""
    return max(128, 2**22 // vocabulary)


@torch.no_grad()
def cross_entropy_of(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same, without gradients, under a head that is more than a matrix: one with packed weights.

    Args:
        head: `[N, D]` to logits `[N, V]`; it is given some tokens at a time.
    """
    ignored, rows = targets.flatten() == IGNORED, hidden.flatten(0, -2)
    wanted = targets.flatten().masked_fill(ignored, 0)
    found = [
        F.cross_entropy(head(rows[chunk]).float(), wanted[chunk], reduction="none")
        for chunk in _chunks(rows, tokens_at_once(head.out_features))
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
    ) -> Tensor:
        nll, log_sum = _likelihoods(hidden, weight, targets, ignore_index, chunk_size, dtype)
        ctx.save_for_backward(hidden, weight, targets, log_sum)
        ctx.options = ignore_index, chunk_size, dtype
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sum = ctx.saved_tensors
        gradients = _gradients(hidden, weight, targets, log_sum, gradient, *ctx.options)
        return *gradients, None, None, None, None


def _likelihoods(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The loss of each of N tokens and the logarithm of the sum of its exponentials, `[N]`."""
    ignored = targets == ignore_index
    targets = targets.masked_fill(ignored, 0)
    log_sums, chosen = [], []
    with without_autocast(hidden):
        narrow = weight.to(dtype)
        for rows in _chunks(hidden, chunk_size):
            logits = _logits(hidden[rows], narrow)
            chosen.append(logits.gather(1, targets[rows, None]).squeeze(1))
            log_sums.append(logits.logsumexp(1))
    log_sum = torch.cat(log_sums)
    return (log_sum - torch.cat(chosen)).masked_fill(ignored, 0), log_sum


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
    ignored = targets == ignore_index
    targets = targets.masked_fill(ignored, 0)
    with without_autocast(hidden):
        narrow = weight.to(dtype)
        gradient = gradient.masked_fill(ignored, 0)[:, None]
        grad_hidden = hidden.new_empty(hidden.shape)
        grad_weight = weight.new_zeros(weight.shape, dtype=log_sum.dtype)
        for rows in _chunks(hidden, chunk_size):
            # d nll / d logits = softmax(logits) - one_hot(target)
            grad = _logits(hidden[rows], narrow).sub_(log_sum[rows, None]).exp_()
            grad.scatter_add_(1, targets[rows, None], torch.full_like(grad[:, :1], -1))
            narrow_grad = grad.mul_(gradient[rows]).to(dtype)
            grad_hidden[rows] = (narrow_grad @ narrow).to(hidden.dtype)
            grad_weight += narrow_grad.T @ hidden[rows].to(dtype)
    return grad_hidden, grad_weight.to(weight.dtype)


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
    result = hidden.new_empty(targets.shape, dtype=_at_least_float32(dtype))
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


def _chunks(hidden: Tensor, chunk_size: int) -> list[slice]:
    """Of all tokens; one where there is none."""
    return [slice(start, start + chunk_size) for start in range(0, max(hidden.shape[0], 1), chunk_size)]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden.to(weight.dtype) @ weight.T).to(_at_least_float32(weight.dtype))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
