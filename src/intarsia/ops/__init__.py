"""The operators: one signature each, several implementations behind it."""

from intarsia.ops.attention import latent_attention, softmax_attention
from intarsia.ops.attention_gated import cumulative_log_gate
from intarsia.ops.blocks import pick_blocks
from intarsia.ops.blocks_loss import blocks_loss
from intarsia.ops.compressed import compressed_attention
from intarsia.ops.conv import short_convolution
from intarsia.ops.decode import DecodeStep
from intarsia.ops.explain import explain
from intarsia.ops.gate import Gate
from intarsia.ops.keys import BlockTable, Paged
from intarsia.ops.linear import dplr_rule, gated_delta_rule, linear_attention
from intarsia.ops.norm import gated_rms_norm, l2norm
from intarsia.ops.packed_linear import packed_linear
from intarsia.ops.packed_weights import PackedWeights, pack_weights
from intarsia.ops.picked_share import picked_share
from intarsia.ops.pools import NEW, InSlots, Slots, StatePool
from intarsia.ops.sequences import Sequences
from intarsia.ops.softmax import log_sum_exp, softmax_gradient
from intarsia.ops.sparse import indexer_loss, lightning_indexer, sparse_attention, sparse_latent_attention
from intarsia.ops.swiglu import swiglu

__all__ = [
    "NEW",
    "BlockTable",
    "DecodeStep",
    "Gate",
    "InSlots",
    "PackedWeights",
    "Paged",
    "Sequences",
    "Slots",
    "StatePool",
    "blocks_loss",
    "compressed_attention",
    "cumulative_log_gate",
    "dplr_rule",
    "explain",
    "gated_delta_rule",
    "gated_rms_norm",
    "indexer_loss",
    "l2norm",
    "latent_attention",
    "lightning_indexer",
    "linear_attention",
    "log_sum_exp",
    "pack_weights",
    "packed_linear",
    "pick_blocks",
    "picked_share",
    "short_convolution",
    "softmax_attention",
    "softmax_gradient",
    "sparse_attention",
    "sparse_latent_attention",
    "swiglu",
]
