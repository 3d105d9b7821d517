"""The table: what can compute each operator, the fastest first.

A new implementation of an operator is a file `<operator>_<name>.py` that ends in an `Implementation`, and its name
in the operator's list here. Nothing else has to know of it: `impl="auto"` chooses from this table, `explain` reads it,
and the operators' tests run through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from intarsia.ops import (
    attention_cpu,
    attention_reference,
    attention_torch,
    blocks_loss_reference,
    blocks_loss_torch,
    blocks_reference,
    blocks_torch,
    compressed_folded,
    compressed_reference,
    conv_cpu,
    conv_reference,
    conv_torch,
    decode_cpu,
    decode_reference,
    decode_torch,
    dplr_cpu,
    indexer_loss_torch,
    indexer_torch,
    latent_attention_torch,
    linear_chunked,
    linear_cpu,
    linear_fla,
    linear_reference,
    norm_cpu,
    norm_reference,
    norm_torch,
    packed_linear_cpu,
    packed_linear_reference,
    packed_linear_torch,
    pick_cpu,
    softmax_cpu,
    softmax_reference,
    softmax_torch,
    sparse_cpu,
    sparse_reference,
    sparse_torch,
    swiglu_cpu,
    swiglu_reference,
    swiglu_torch,
)
from intarsia.ops.choice import Operator, table
from intarsia.ops.pools import InSlots

_LINEAR = (
    linear_cpu.IMPLEMENTATION,
    linear_fla.IMPLEMENTATION,
    linear_chunked.IMPLEMENTATION,
    linear_reference.IMPLEMENTATION,
)

TABLE: Mapping[str, Operator] = table(
    {
        "gated_delta_rule": _LINEAR,
        "linear_attention": _LINEAR,
        "dplr_rule": (
            dplr_cpu.IMPLEMENTATION,
            linear_fla.IMPLEMENTATION,
            linear_chunked.IMPLEMENTATION,
            linear_reference.IMPLEMENTATION,
        ),
        "decode_step": (
            decode_cpu.IMPLEMENTATION,
            decode_torch.IMPLEMENTATION,
            decode_reference.IMPLEMENTATION,
        ),
        "short_convolution": (
            conv_cpu.IMPLEMENTATION,
            conv_torch.IMPLEMENTATION,
            conv_reference.IMPLEMENTATION,
        ),
        "gated_rms_norm": (
            norm_cpu.IMPLEMENTATION,
            norm_torch.IMPLEMENTATION,
            norm_reference.IMPLEMENTATION,
        ),
        "softmax_attention": (
            attention_cpu.IMPLEMENTATION,
            attention_torch.IMPLEMENTATION,
            attention_reference.IMPLEMENTATION,
        ),
        "latent_attention": (
            attention_cpu.OF_LATENTS,
            latent_attention_torch.IMPLEMENTATION,
            attention_reference.OF_LATENTS,
        ),
        "compressed_attention": (
            compressed_folded.NATIVE,
            compressed_folded.IN_TORCH,
            compressed_reference.IMPLEMENTATION,
        ),
        "pick_blocks": (pick_cpu.BLOCKS, blocks_torch.IMPLEMENTATION, blocks_reference.IMPLEMENTATION),
        "blocks_loss": (blocks_loss_torch.IMPLEMENTATION, blocks_loss_reference.IMPLEMENTATION),
        "lightning_indexer": (pick_cpu.INDEXER, indexer_torch.IMPLEMENTATION, sparse_reference.INDEXER),
        "indexer_loss": (indexer_loss_torch.IMPLEMENTATION, sparse_reference.LOSS),
        "sparse_attention": (
            sparse_cpu.IMPLEMENTATION,
            sparse_torch.IMPLEMENTATION,
            sparse_reference.IMPLEMENTATION,
        ),
        "sparse_latent_attention": (
            sparse_cpu.OF_LATENTS,
            sparse_torch.OF_LATENTS,
            sparse_reference.OF_LATENTS,
        ),
        "packed_linear": (
            packed_linear_cpu.IMPLEMENTATION,
            packed_linear_torch.IMPLEMENTATION,
            packed_linear_reference.IMPLEMENTATION,
        ),
        "l2norm": (norm_torch.OF_LENGTH, norm_reference.OF_LENGTH),
        "swiglu": (
            swiglu_cpu.IMPLEMENTATION,
            swiglu_torch.IMPLEMENTATION,
            swiglu_reference.IMPLEMENTATION,
        ),
        "log_sum_exp": (softmax_cpu.LOG_SUM, softmax_torch.LOG_SUM, softmax_reference.LOG_SUM),
        "softmax_gradient": (softmax_cpu.GRADIENT, softmax_torch.GRADIENT, softmax_reference.GRADIENT),
    },
    not_yet={"triton": "there are no Triton kernels of our own yet"},
)


def run(operator: str, call: Any, impl: str) -> Any:
    """Compute a call by the implementation that `impl` names or that serves it fastest.

    Raises:
        ConfigError: no implementation has that name.
        UnsupportedError: the named implementation cannot serve this call.
    """
    return TABLE[operator].choose(call, impl).run(call)


def run_in_slots(operator: str, call: Any, held: InSlots, impl: str) -> Tensor:
    """The outputs of a call, which has no initial state of its own, for sequences whose states are `held`; these are
    updated. Where no implementation can do that in place, they are gathered and written back. Errors as `run`."""
    chosen = TABLE[operator].choose(call, impl)
    if chosen.in_slots is not None and (o := chosen.in_slots(call, held)) is not None:
        return o
    o, final = chosen.run(call.after(held.gathered()))
    held.write(final)
    return o
