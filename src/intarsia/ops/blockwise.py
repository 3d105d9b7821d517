"""What the softmax mixers share that no fused kernel serves: they work on blocks of queries, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from intarsia.ops.sequences import Sequences
from intarsia.ops.triangular import unit_lower_inverse
from intarsia.ops.uncompiled import Uncompiled


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`. For a backward pass only the arguments are kept, and the rest is computed again: a
    block's logits are given back before the next block's are made, in training too."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def products_of_all(q: Tensor, k: Tensor) -> Tensor:
    """`[B, R, *heads, h, S]`: of queries `[B, R, *heads, h, K]` with keys `[B, *heads, S, K]` that all R share. A
    product that is broadcast would copy the keys for each."""
    R, h = q.shape[1], q.shape[-2]
    products = q.movedim(1, -3).flatten(-3, -2) @ k.mT
    return products.unflatten(-2, (R, h)).movedim(-3, 1)


def per_sequence(function: Callable[..., Tensor], seqs: Sequences | None, *tensors: Tensor | None) -> Tensor:
    """`function(*tensors)`, or of each packed sequence's part of the tensors `[1, T, ...]`, laid end to end."""
    return function(*tensors) if seqs is None else _each(function, seqs.occupied, tensors)


def _each(
    function: Callable[..., Tensor], lengths: Sequence[int], tensors: Sequence[Tensor | None]
) -> Tensor:
    if len(lengths) == 1:
        return function(*tensors)
    nothing = [None] * len(lengths)
    parts = (nothing if x is None else x.split(lengths, dim=1) for x in tensors)
    return torch.cat([function(*part) for part in zip(*parts, strict=True)], dim=1)


class Blockwise:
    """A function of whole or packed sequences that works on blocks of their tokens, one after the other, in a loop that
    torch.compile need not unroll anew for each length (`Uncompiled`)."""

    def __init__(
        self,
        name: str,
        inputs: int,
        function: Callable[..., Tensor],
        result: Callable[[Sequence[Any]], Tensor],
    ) -> None:
        """
        Args:
            name: of the operator in graphs.
            inputs: how many tensors the function takes.
            function: `function(*tensors, *numbers)` of one sequence.
            result: of the tensors, a tensor of the shape and dtype of what the function returns.
        """

        def run(
            tensors: Sequence[Tensor | None], lengths: Sequence[int], numbers: Sequence[float]
        ) -> list[Tensor]:
            occupied = [n for n in lengths if n]
            return [_each(lambda *parts: function(*parts, *numbers), occupied, tensors)]

        self._operator = Uncompiled(name, inputs, 1, run, lambda tensors, *_: [result(tensors)])

    def __call__(self, seqs: Sequences | None, tensors: Sequence[Tensor | None], *numbers: float) -> Tensor:
        """Of `tensors` `[B, T, ...]`, or None; packed ones have `B == 1`."""
        assert tensors[0] is not None
        lengths = (tensors[0].shape[1],) if seqs is None else seqs.lengths
        return self._operator(tensors, lengths, numbers)[0]


def strict_inverse(n: Tensor) -> Tensor:
    """`(I + n)^-1` `[..., C, C]` for any C; of `n` only what lies below the diagonal counts."""
    C = n.shape[-1]
    room = (1 << (C - 1).bit_length()) - C
    return unit_lower_inverse(F.pad(n, (0, room, 0, room)))[..., :C, :C]
