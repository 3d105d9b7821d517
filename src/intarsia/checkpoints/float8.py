"""Weights of eight bits with a scale for each block, as DeepSeek-V3, MiniMax-M2 and others are released in."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.checkpoints.options import Options
from intarsia.errors import CheckpointError

SCALES = "_scale_inv"
"""What the name of a weight's scales ends in. They are no inverses: weights are multiplied by them."""

Block = tuple[int, int]
"""Rows and columns of the last two dimensions that share a scale."""


def float8_blocks(options: Options) -> Block | None:
    """The blocks of a checkpoint whose weights are such; None where it says nothing of quantised weights.

    Raises:
        UnsupportedError: they are quantised in another way.
    """
    if not options.has("quantization_config"):
        return None
    how = options.within("quantization_config")
    how.only("quant_method", "fp8", part="weights of that format in this family")
    how.only("fmt", "e4m3", "float8_e4m3fn", "e4m3fn", part="weights of that format")
    # Of activations here nothing is quantised; a scheme that is not dynamic has tensors of its own.
    how.only("activation_scheme", "dynamic", part="activations with scales in the file")
    for name in ("scale_fmt", "modules_to_not_convert", "ignored_layers", "dequantize"):
        how.maybe(name, object)
    if not how.has("weight_block_size"):
        raise how.unsupported("weights of eight bits without blocks (weight_block_size) are not read yet")
    block = how.get("weight_block_size", list)
    how.finish()
    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise CheckpointError(f"{how.where}: weight_block_size must be two sizes; it is {block}")
    return block[0], block[1]


def scales_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Of the scales of a weight of `shape`."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def dequantised(numbers: Tensor, scales: Tensor, block: Block, first: int = 0) -> Tensor:
    """The numbers `[..., N, K]` times their scales, in float32; `numbers` begin with row `first` of what the scales
    `[..., rows / block, K / block]` are of."""
    rows = torch.arange(first, first + numbers.shape[-2], device=scales.device) // block[0]
    of_rows = scales.float().index_select(-2, rows)
    whole = of_rows.repeat_interleave(block[1], dim=-1)[..., : numbers.shape[-1]]
    return whole.mul_(numbers.float())
