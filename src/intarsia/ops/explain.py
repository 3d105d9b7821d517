"""What would run, and why, without running it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from intarsia.errors import ConfigError
from intarsia.ops.attention import latent_attention, softmax_attention
from intarsia.ops.attention_call import attention_call, latent_call
from intarsia.ops.blocks import pick_blocks
from intarsia.ops.blocks_call import blocks_call
from intarsia.ops.blocks_loss import blocks_loss
from intarsia.ops.blocks_loss_call import blocks_loss_call
from intarsia.ops.choice import AUTO, Choice
from intarsia.ops.compressed import compressed_attention
from intarsia.ops.compressed_call import compressed_call
from intarsia.ops.conv import short_convolution
from intarsia.ops.conv_call import conv_call
from intarsia.ops.decode import DecodeStep, step_call
from intarsia.ops.indexer_loss_call import indexer_loss_call
from intarsia.ops.linear import dplr_rule, gated_delta_rule, linear_attention
from intarsia.ops.linear_call import delta_call, linear_call
from intarsia.ops.norm import gated_rms_norm, l2norm
from intarsia.ops.norm_call import length_call, norm_call
from intarsia.ops.packed_linear import packed_linear
from intarsia.ops.packed_linear_call import packed_linear_call
from intarsia.ops.softmax import log_sum_exp, softmax_gradient
from intarsia.ops.softmax_call import log_sum_call, softmax_call
from intarsia.ops.sparse import indexer_loss, lightning_indexer, sparse_attention, sparse_latent_attention
from intarsia.ops.sparse_call import indexer_call, sparse_call, sparse_latent_call
from intarsia.ops.swiglu import swiglu
from intarsia.ops.swiglu_call import swiglu_call
from intarsia.ops.table import TABLE

OPERATORS: Mapping[Callable[..., Any], tuple[str, Callable[..., Any]]] = {
    gated_delta_rule: ("gated_delta_rule", delta_call),
    linear_attention: ("linear_attention", linear_call),
    dplr_rule: ("dplr_rule", linear_call),
    DecodeStep: ("decode_step", step_call),
    softmax_attention: ("softmax_attention", attention_call),
    latent_attention: ("latent_attention", latent_call),
    compressed_attention: ("compressed_attention", compressed_call),
    pick_blocks: ("pick_blocks", blocks_call),
    blocks_loss: ("blocks_loss", blocks_loss_call),
    lightning_indexer: ("lightning_indexer", indexer_call),
    indexer_loss: ("indexer_loss", indexer_loss_call),
    sparse_attention: ("sparse_attention", sparse_call),
    sparse_latent_attention: ("sparse_latent_attention", sparse_latent_call),
    short_convolution: ("short_convolution", conv_call),
    gated_rms_norm: ("gated_rms_norm", norm_call),
    l2norm: ("l2norm", length_call),
    swiglu: ("swiglu", swiglu_call),
    log_sum_exp: ("log_sum_exp", log_sum_call),
    softmax_gradient: ("softmax_gradient", softmax_call),
    packed_linear: ("packed_linear", packed_linear_call),
}
"""The name of each operator in the table, and what makes a call of its arguments (all but `impl`)."""


def explain(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which implementation `operator(*args, **kwargs)` would run, and why, without running it.

    `operator` is any of `intarsia.ops`; of the decode step the class, with what a step is made of, or a step, with what
    it is called with.

    Raises:
        ConfigError: there is no such operator, or no such `impl`.
        UnsupportedError: the `impl` that is named cannot serve the call.
        ShapeError, TypeError: arguments that do not fit.

    >>> import torch
    >>> q = k = v = torch.randn(1, 8, 2, 16)
    >>> explain(gated_delta_rule, q, k, v, impl="chunked").reason
    'it was asked for by name'
    """
    if isinstance(operator, DecodeStep):
        return operator.explain(*args, **kwargs)
    if operator not in OPERATORS:
        raise ConfigError(f"explain() knows {', '.join(x.__name__ for x in OPERATORS)}; got {operator!r}")
    name, make_call = OPERATORS[operator]
    arguments = inspect.signature(operator).bind(*args, **kwargs).arguments
    impl = arguments.pop("impl", AUTO)
    return TABLE[name].explain(make_call(**arguments), impl)
