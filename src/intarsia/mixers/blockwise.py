"""What the softmax mixers share that no fused kernel serves: they work on blocks of queries, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from intarsia.ops import Sequences
from intarsia.ops.triangular import unit_lower_inverse


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`. For a backward pass only the arguments are kept, and the rest is computed again: a
    block's logits are given back before the next block's are made, in training too."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def per_sequence(function: Callable[..., Tensor], seqs: Sequences | None, *tensors: Tensor | None) -> Tensor:
    """`function(*tensors)`, or of each packed sequence's part of the tensors `[1, T, ...]`, laid end to end."""
    if seqs is None or len(seqs.occupied) == 1:
        return function(*tensors)
    nothing = [None] * len(seqs.occupied)
    parts = (nothing if x is None else x.split(seqs.occupied, dim=1) for x in tensors)
    return torch.cat([function(*part) for part in zip(*parts, strict=True)], dim=1)


def strict_inverse(n: Tensor) -> Tensor:
    """`(I + n)^-1` `[..., C, C]` for any C; of `n` only what lies below the diagonal counts."""
    C = n.shape[-1]
    room = (1 << (C - 1).bit_length()) - C
    return unit_lower_inverse(F.pad(n, (0, room, 0, room)))[..., :C, :C]
