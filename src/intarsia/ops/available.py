"""Which implementations an operator has on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from intarsia.ops.attention_call import attention_call, latent_call
from intarsia.ops.blocks_call import blocks_call
from intarsia.ops.blocks_loss_call import blocks_loss_call
from intarsia.ops.compressed_call import compressed_call
from intarsia.ops.conv_call import conv_call
from intarsia.ops.decode_call import StepCall
from intarsia.ops.indexer_loss_call import indexer_loss_call
from intarsia.ops.linear_call import linear_call
from intarsia.ops.norm_call import length_call, norm_call
from intarsia.ops.packed_linear_call import packed_linear_call
from intarsia.ops.packed_weights import pack_weights
from intarsia.ops.softmax_call import log_sum_call, softmax_call
from intarsia.ops.sparse_call import indexer_call, sparse_call, sparse_latent_call
from intarsia.ops.swiglu_call import swiglu_call
from intarsia.ops.table import TABLE

# Of a tensor of zeros `[1, 1, 1, 1]`.
_SMALLEST: Mapping[str, Callable[[Tensor], Any]] = {
    "linear_attention": lambda x: linear_call(x, x, x),
    "gated_delta_rule": lambda x: linear_call(x, x, x, beta=x[..., 0]),
    "dplr_rule": lambda x: linear_call(x, x, x, a=x, b=x),
    "decode_step": lambda x: StepCall(tensors=(x,)),
    "softmax_attention": lambda x: attention_call(x, x, x),
    "latent_attention": lambda x: latent_call(x, x[0], x[0].expand(1, 2, 1)),
    "lightning_indexer": lambda x: indexer_call(x, x[0], x[0], count=1),
    "compressed_attention": lambda x: compressed_call(x, x, x, stride=1),
    "pick_blocks": lambda x: blocks_call(x, x, count=1, block=1),
    "blocks_loss": lambda x: blocks_loss_call(x, x[0], x, x, block=1),
    "indexer_loss": lambda x: indexer_loss_call(x, x[0], x[0], x, x),
    "sparse_attention": lambda x: sparse_call(x, x, x, x.int()),
    "sparse_latent_attention": lambda x: sparse_latent_call(x, x[0], x[0].expand(1, 2, 1), x.int()),
    "short_convolution": lambda x: conv_call(x[0], x[0, 0]),
    "gated_rms_norm": lambda x: norm_call(x, x, x[0, 0, 0], eps=1.0),
    "l2norm": length_call,
    "swiglu": lambda x: swiglu_call(x, x),
    "log_sum_exp": lambda x: log_sum_call(x[0, 0]),
    "softmax_gradient": lambda x: softmax_call(x[0, 0], x[0, 0, 0], x[0, 0, 0].long(), x[0, 0, 0]),
    "packed_linear": lambda x: packed_linear_call(x, pack_weights(x[0, 0], "float32")),
}
"""The smallest call of each operator."""


def available(
    operator: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[str, ...]:
    """The names of the implementations that serve calls of an operator of the table in this dtype, the fastest first.

    >>> available("dplr_rule")
    ('chunked', 'reference')
    """
    call = _SMALLEST[operator](torch.zeros(1, 1, 1, 1, device=device, dtype=dtype))
    return tuple(each.name for each in TABLE[operator].implementations if each.refuse(call) is None)
