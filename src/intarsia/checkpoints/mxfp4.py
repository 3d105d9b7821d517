"""Weights of four bits with scales of blocks (OCP Microscaling Formats 1.0), which become floats as they are read."""

from __future__ import annotations

import torch

from intarsia.checkpoints.rows import Tensors, Transform
from intarsia.errors import UnsupportedError

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The sixteen numbers of four bits, e2m1 (OCP Microscaling Formats 1.0)."""


def from_mxfp4(theirs: Tensors) -> Tensors:
    """Blocks of 32 numbers, `[N, K / 32, 16]` bytes of two numbers each, the first in the low bits, times two to the
    power of their scale `[N, K / 32]` less 127; to `[N, K]` float32."""
    blocks, scales = theirs
    numbers = torch.tensor(FP4, device=blocks.device)
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    return (torch.ldexp(numbers[pairs.int()], (scales.int() - 127).unsqueeze(-1)).flatten(-2),)


def _no_mxfp4(ours: Tensors) -> Tensors:
    raise UnsupportedError("weights are not written as MXFP4")


MXFP4 = Transform("from MXFP4", from_mxfp4, _no_mxfp4)


def _from_rows(theirs: Tensors) -> Tensors:
    numbers = (
        from_mxfp4((blocks.unflatten(-1, (-1, 16)), scales))[0]
        for blocks, scales in zip(theirs[::2], theirs[1::2], strict=True)
    )
    return (torch.cat(list(numbers)),)


MXFP4_ROWS = Transform("from rows of MXFP4", _from_rows, _no_mxfp4)
"""Pairs of `[N, K / 2]` bytes and scales `[N, K / 32]`, as compressed-tensors has them, one behind the other."""
